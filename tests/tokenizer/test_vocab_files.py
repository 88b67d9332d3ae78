"""The commands `being-vl vocab show`, `merge-stats`, `truncate` and `import`, on good and on hostile files."""

import csv
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from being_vl import VisualBPE
from being_vl.errors import BeingVLError
from being_vl.tokenizer.published import read_published
from helpers.commands import FileCreator, being_vl, expect_refusal

PHOTOS = np.load(Path(__file__).parents[1] / "helpers" / "photo_grids.npz")["grids"]
PHOTOS.flags.writeable = False
K = 1024


# Looking at vocabularies


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vocabularies")
    vocabulary_files = {}
    for mode in ("pair", "oriented"):
        vocabulary_files[mode] = folder / f"{mode}.json"
        VisualBPE.train(PHOTOS, K, 300, mode, quantizer_name="vq").save(vocabulary_files[mode])  # type: ignore[arg-type]
    return vocabulary_files


@pytest.mark.parametrize("mode", ["pair", "oriented"])
def test_truncate(
    mode: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "short.json"
    assert being_vl("vocab", "truncate", files[mode], "--merges", 120, "--out", out) == 0
    VisualBPE.train(PHOTOS, K, 120, mode, quantizer_name="vq").save(tmp_path / "trained.json")  # type: ignore[arg-type]
    assert out.read_bytes() == (tmp_path / "trained.json").read_bytes()
    full_bpe = VisualBPE.load(files[mode])
    assert full_bpe.truncate(300) == full_bpe
    assert full_bpe.truncate(0).merges == []
    for merges in (301, -1):
        with pytest.raises(BeingVLError, match=f"{merges}: expected 0 to 300"):
            full_bpe.truncate(merges)
        line = expect_refusal(
            capsys,
            being_vl("vocab", "truncate", files[mode], f"--merges={merges}", "--out", tmp_path / "no.json"),
        )
        assert f"{merges}" in line
    assert not (tmp_path / "no.json").exists()


def count_cells(bpe: VisualBPE, token: int) -> int:
    if token < bpe.base_vocab_size:
        return 1
    a, b, *_ = bpe.merges[token - bpe.base_vocab_size]
    return count_cells(bpe, a) + count_cells(bpe, b)


@pytest.mark.parametrize("mode", ["pair", "oriented"])
def test_merge_stats(mode: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    bpe = VisualBPE.load(files[mode])
    outputs = {}
    for form in ("csv", "json", "table"):
        assert being_vl("vocab", "merge-stats", files[mode], "--format", form) == 0
        outputs[form] = capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO(outputs["csv"])))
    assert len(rows) == 300
    for row, info, merge in zip(rows, bpe.merge_infos, json.loads(outputs["json"])["merges"], strict=True):
        expected = [K + info.done - 1, *info[2:9], count_cells(bpe, K + info.done - 1)]
        assert list(merge.values()) == expected
        assert list(row.values()) == ["" if value is None else str(value) for value in expected]
    statistics = json.loads(outputs["json"])["statistics"]
    num_merged_parts = [(a >= K) + (b >= K) for a, b, *_ in bpe.merges]
    assert list(statistics["merges"].values()) == [num_merged_parts.count(n) for n in range(3)]
    assert statistics["n"]["max"] == max(info.n for info in bpe.merge_infos)
    assert statistics["s"]["median"] == sorted(info.s for info in bpe.merge_infos)[149]
    assert statistics["cells"]["min"] == 2
    assert f"{statistics['merges']['base + merged']} merges base + merged" in outputs["table"]
    assert len(outputs["table"].splitlines()) > 300
    assert ("dy" in outputs["table"]) == (mode == "oriented")


TINY_GRIDS = [[[0, 1, 2], [0, 1, 3], [2, 3, 2]], [[0, 1, 3], [3, 2, 3], [0, 1, 2]]]


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, Path]) -> None:
    path = tmp_path / "v.json"
    grids = tmp_path / "grids.npy"
    np.save(grids, np.array(TINY_GRIDS))
    for mode in ("oriented", "pair"):
        VisualBPE.train(TINY_GRIDS, 4, 2, mode, alpha=0.0, min_frequency=1).save(path)
        assert VisualBPE.load(path).merges[0][:2] == (0, 1)
        assert being_vl("vocab", "show", path, "--token", 4) == 0
        output = capsys.readouterr().out
        assert f"merge_mode            {mode}\n" in output
        assert "2 of 3x3" in output
        title = "token 4 = 0 + 1, 2 cells"
        if mode == "oriented":
            assert output.endswith(f"{title} in 1x2:\n0 1\n")
        else:
            assert f"{title}; in pair mode its shape is not fixed" in output
        assert being_vl("vocab", "show", path, "--token", 4, "--grids", grids) == 0
        assert capsys.readouterr().out.endswith(f"{title} in 1x2:\n0 1\n")
    assert being_vl("vocab", "show", files["pair"], "--format", "json", "--merges", 2) == 0
    output_content = json.loads(capsys.readouterr().out)
    assert (output_content["num_merges"], output_content["quantizer_name"], output_content["grid_sizes"]) == (
        300,
        "vq",
        [[32, 32, 48]],
    )
    assert [row["token"] for row in output_content["first_merges"] + output_content["last_merges"]] == [
        K,
        K + 1,
        K + 298,
        K + 299,
    ]
    assert output_content["token"]["cells"] is None
    ids, regions = VisualBPE.load(files["pair"]).encode(PHOTOS[0], return_regions=True)
    place = int(np.argmax(ids >= K))
    assert being_vl("vocab", "show", files["pair"], "--token", ids[place], "--format", "json") == 0
    token = json.loads(capsys.readouterr().out)["token"]
    assert sorted(token["ids"]) == sorted(PHOTOS[0][np.asarray(regions) == place])


def test_show_names_what_is_wrong(
    tmp_path: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for token in (-1, K + 300):
        line = expect_refusal(capsys, being_vl("vocab", "show", files["pair"], f"--token={token}"))
        what = f"token {token} is not in the vocabulary, expected 0 to {K + 299}"
        assert (what if token > 0 else f"token: expected at least 0, found {token}") in line
    np.save(tmp_path / "zeros.npy", np.zeros((1, 2, 2), int))
    line = expect_refusal(
        capsys, being_vl("vocab", "show", files["pair"], "--token", K + 9, "--grids", tmp_path / "zeros.npy")
    )
    assert "is in none of the grids of" in line
    assert "zeros.npy" in line


@pytest.mark.parametrize("command", ["show", "merge-stats", "truncate"])
def test_damaged_vocabularies(
    command: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = files["pair"].read_text()
    flags = ("--merges", 3, "--out", tmp_path / "out.json") if command == "truncate" else ()
    content = json.loads(text)
    content["merges"][7]["a"] = K + 7
    for damage, word in (
        (text[: len(text) // 2], "line"),
        (text.replace('"version": 1', '"version": 9'), "version is 9"),
        (json.dumps(content), "merge 7: a = 1031 is not an earlier token"),
        ("", "line 1"),
    ):
        (tmp_path / "v.json").write_text(damage)
        line = expect_refusal(capsys, being_vl("vocab", command, tmp_path / "v.json", *flags))
        assert "v.json" in line
        assert word in line
    line = expect_refusal(capsys, being_vl("vocab", command, tmp_path / "none.json", *flags))
    assert "none.json" in line


def test_numbers_as_large_as_the_file_allows(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counts up to 2**64 - 1, and tokens that double two hundred times."""
    content = json.loads(files["oriented"].read_text())
    del content["checksum"]
    merge_fields = {"dy": 1, "dx": 0, "n": 2**64 - 1, "n_offset": 2**64 - 1, "s": 1.0}
    content["merges"] = [{"a": max(K + i - 1, 0), "b": max(K + i - 1, 0), **merge_fields} for i in range(200)]
    content["num_merges"] = 200
    path = tmp_path / "v.json"
    path.write_text(json.dumps(content))
    assert being_vl("vocab", "merge-stats", path, "--format", "json") == 0
    statistics = json.loads(capsys.readouterr().out)["statistics"]
    assert statistics["n"]["median"] == 2**64 - 1
    assert statistics["cells"]["max"] == 2**63 - 1
    assert being_vl("vocab", "show", path) == 0
    assert f"token {K + 5} = {K + 4} + {K + 4}" in capsys.readouterr().out
    line = expect_refusal(capsys, being_vl("vocab", "show", path, "--token", K + 199))
    assert "more than the 65536 that are shown" in line


def test_a_reader_that_has_seen_enough(files: dict[str, Path]) -> None:
    """As in `being-vl vocab merge-stats v.json | head`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "being_vl", "vocab", "merge-stats", str(files["pair"])]
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (run.returncode, run.stderr) == (0, "")


# What Being-VL-0.5 published


def test_import(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    merges = [((int(a), int(b)), 8192 + i) for i, (a, b) in enumerate([(5, 7), (8192, 7), (8192, 8193)])]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "vocab.pkl").write_bytes(pickle.dumps(merges, protocol))
        out = tmp_path / f"v{protocol}.json"
        with caplog.at_level("INFO", logger="being_vl"):
            assert being_vl("vocab", "import", tmp_path / "vocab.pkl", "--out", out) == 0
        assert VisualBPE.load(out).merges == [pair for pair, _ in merges]
    assert "3 merges" in caplog.text
    command = ["vocab", "import", tmp_path / "vocab.pkl", "--out", tmp_path / "no.json"]
    line = expect_refusal(capsys, being_vl(*command, "--codebook_size", 1024))
    assert "merge 0 makes token 8192, expected 1024" in line
    assert not (tmp_path / "no.json").exists()


def test_another_vocabulary_is_not_replaced(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vocab.pkl").write_bytes(pickle.dumps([((5, 7), 8192)]))
    jobs = (["import", tmp_path / "vocab.pkl"], ["truncate", files["pair"], "--merges", 7])
    for first_job, second_job in (jobs, jobs[::-1]):
        out = tmp_path / f"{first_job[0]}.json"
        assert being_vl("vocab", *first_job, "--out", out) == 0
        assert being_vl("vocab", *first_job, "--out", out) == 0
        content = out.read_bytes()
        assert "--overwrite" in expect_refusal(capsys, being_vl("vocab", *second_job, "--out", out))
        assert out.read_bytes() == content
        assert being_vl("vocab", *second_job, "--out", out, "--overwrite") == 0
        assert VisualBPE.load(out).num_merges == {"import": 1, "truncate": 7}[second_job[0]]


HOSTILE_FILES = {
    "GLOBAL": b"cos\nsystem\n(S'touch executed'\ntR.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0etouch executed\x85R.",
    "INST": b"(S'touch executed'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch executed'\no.",
    "NEWOBJ": b"\x80\x02cos\nsystem\nU\x0etouch executed\x85\x81.",
    "REDUCE": pickle.dumps([((0, 1), 8192), FileCreator()], 0),
    "REDUCE by protocol 5": pickle.dumps([((0, 1), 8192), FileCreator()], 5),
    "eval": b'c__builtin__\neval\n(S\'open("executed", "w")\'\ntR.',
    "BUILD": b"]}b.",
    "BUILD of a list": b"]K\x01b.",
    "PERSID": b"Pos.system\n.",
    "BINPERSID": b"K\x01Q.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "dictionary": pickle.dumps([{}]),
    "set": pickle.dumps([{1}]),
    "float": pickle.dumps([((0, 1.5), 8192)]),
    "string": pickle.dumps([(("0", 1), 8192)]),
    "bytes of length 2**63": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "bool": pickle.dumps([((0, True), 8192)], 2),
    "bool of protocol 0": pickle.dumps([((0, True), 8192)], 0),
    "None": pickle.dumps(None),
    "DUP": b"]2.",
    "POP": b"]]0.",
    "int of a million digits": b"L" + b"9" * 10**6 + b"L\n.",
    "INT of a million digits": b"I" + b"9" * 10**6 + b"\n.",
    "int of 255 bytes": b"](K\x01\x8a\xff" + b"\x7f" * 255 + b"tK\x02\x86a.",
    "int of 2**31 bytes": b"\x8b\xff\xff\xff\x7f.",
    "int of 2000 bytes": b"\x8b\xd0\x07\x00\x00" + b"\x7f" * 2000 + b".",
    "negative": pickle.dumps([((0, -1), 8192)]),
    "deep tuples": b")" + b"\x85" * 10**5 + b".",
    "deep lists": b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "deep marks": b"(" * 10**5 + b"t" * 10**5 + b".",
    "list in itself": b"]q\x00h\x00a.",
    "unknown memo": b"h\x07.",
    "memo before anything": b"q\x00.",
    "APPEND to nothing": b"K\x01a.",
    "APPEND to a tuple": b")K\x01a.",
    "TUPLE without mark": b"K\x01t.",
    "TUPLE2 of one": b"K\x01\x86.",
    "frame of 2**63 bytes": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f].",
    "no end": b"](K\x01",
    "nothing": b"",
    "STOP alone": b".",
    "JSON": b"[[[0, 1], 8192]]",
    "zeros": bytes(100),
}


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_hostile_pickles(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("vocab.pkl").write_bytes(HOSTILE_FILES[name])
    status = being_vl("vocab", "import", "vocab.pkl", "--out", "v.json")
    if name == "frame of 2**63 bytes":  # lengths of frames are advice, and the list in this one is empty
        assert VisualBPE.load("v.json").merges == []
    else:
        assert "vocab.pkl" in expect_refusal(capsys, status)
        assert not Path("v.json").exists()
    assert not Path("executed").exists()


def test_these_pickles_are_hostile(tmp_path: Path) -> None:
    """Guards the test above: the standard library's unpickler runs the command in them."""
    for name in ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "REDUCE", "REDUCE by protocol 5", "eval"):
        folder = tmp_path / name
        folder.mkdir()
        script = f"import pickle; pickle.loads({HOSTILE_FILES[name]!r})"
        subprocess.run([sys.executable, "-c", script], cwd=folder, timeout=60, check=True)
        assert (folder / "executed").exists(), name


def test_an_index_of_the_memo_takes_no_memory(tmp_path: Path) -> None:
    """The standard library's unpickler would ask for 64 GiB."""
    (tmp_path / "vocab.pkl").write_bytes(b"]r\xff\xff\xff\xff.")
    assert read_published(tmp_path / "vocab.pkl") == []
