"""`being-vl prepare` on the chain of the other tests: what is in its files, and how it is stopped and resumed."""

import hashlib
import io
import json
import os
import random
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from being_vl.account import Account
from being_vl.cli import main
from being_vl.data.options import CATEGORIES, PrepareOptions, RecordFile, SequenceOptions
from being_vl.data.prepare import LEFT_OUT, prepare
from being_vl.data.records import Record, Records
from being_vl.data.sequences import RecordGroup, SequenceBuilder, TokenSequence
from being_vl.data.store import PreparedSequences
from being_vl.errors import ConfigError, FingerprintError, ManifestError, QuantizerError, RecordError
from being_vl.files import read_manifest
from being_vl.training.engine import load_sequences
from being_vl.training.fingerprint import training_fingerprint
from being_vl.training.options import TrainOptions
from helpers import tiny
from helpers.commands import being_vl, expect_refusal
from helpers.ranks import ENVIRONMENT, FORKS


@pytest.fixture(scope="module")
def records(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The chain's records with images, and of a second source those without, in the category `chat`."""
    text = tmp_path_factory.mktemp("records") / "words.jsonl"
    items = json.loads((chain / "data" / "text.json").read_text())
    text.write_text("\n".join(json.dumps(item | {"category": "chat"}) for item in items))
    return [chain / "data" / "train.json", text]


NAMES = [*CATEGORIES, "chat"]


def options(
    chain: Path, records: list[Any], out: Path, lenient: bool = False, **sequence_options: Any
) -> PrepareOptions:
    """Others are options of the sequences."""
    return PrepareOptions(
        chain / "tied",
        records,
        out,
        chain / "grids",
        SequenceOptions(categories=NAMES, **sequence_options),
        lenient,
        shard_size=7,
    )


def read(paths: list[Path]) -> list[Record]:
    return list(Records(paths, categories=NAMES))


def make_flags(chain: Path, records: list[Path], out: Path) -> list[str]:
    paths = ["--model", chain / "tied", "--grids", chain / "grids", "--out", out]
    choices = ["--shard_size", "7", "--sequences.categories", *NAMES]
    return [*map(str, paths), *choices, "--records", *map(str, records)]


def files(folder: Path) -> dict[str, str]:
    """Hash of each file, without what the manifest says of the folder's name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file()
    }


def assert_equal(first: TokenSequence, second: TokenSequence) -> None:
    np.testing.assert_array_equal(first.ids, second.ids)
    np.testing.assert_array_equal(first.weights, second.weights)
    assert first.ids.dtype == second.ids.dtype == np.int32
    assert first.weights.dtype == second.weights.dtype == np.float32
    assert (first.category, first.source, first.location) == (second.category, second.source, second.location)
    assert first.images == second.images


@pytest.fixture(scope="module")
def prepared_folder(chain: Path, records: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run in this process makes."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(options(chain, records, out))
    return out


def test_sequences_are_those_that_the_builder_makes(
    chain: Path, records: list[Path], prepared_folder: Path
) -> None:
    builder = tiny.builder(options(chain, records, prepared_folder))
    expected: dict[RecordGroup, list[TokenSequence]] = {}
    for sequence in builder.build(read(records)):
        expected.setdefault(sequence.group, []).append(sequence)
    sequences = PreparedSequences(prepared_folder, builder)
    assert sequences.lengths.keys() == expected.keys()
    assert RecordGroup("chat", "words", True) in expected
    assert RecordGroup("perception", "train", False) in expected
    for group, group_sequences in expected.items():
        assert sequences.lengths[group].dtype == np.int32
        assert sequences.lengths[group].tolist() == [len(sequence.ids) for sequence in group_sequences]
        for index, sequence in enumerate(group_sequences):
            assert_equal(sequences.get(group, index, 0), sequence)
    manifest = read_manifest(prepared_folder, "sequences")
    all_sequences = [sequence for group_sequences in expected.values() for sequence in group_sequences]
    assert manifest["records"] == manifest["sequences"] == len(all_sequences)
    assert manifest["tokens"] == sum(len(sequence.ids) for sequence in all_sequences)
    assert manifest["label_tokens"] == sum(np.count_nonzero(sequence.weights) for sequence in all_sequences)
    assert manifest["faults"] == {}


def run(arguments: list[str], environment: dict[str, str]) -> Any:
    """The command in a process of its own."""
    process = FORKS.Process(target=_command, args=(arguments, environment), daemon=False)
    process.start()
    return process


def _command(arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.update(ENVIRONMENT | environment)
    raise SystemExit(main(["prepare", *arguments]))


def test_workers_and_ranks_make_the_same_files(
    chain: Path, records: list[Path], prepared_folder: Path, tmp_path: Path
) -> None:
    worker_process = run([*make_flags(chain, records, tmp_path / "workers"), "--workers", "2"], {})
    ranks = [
        run(make_flags(chain, records, tmp_path / "ranks"), {"RANK": str(rank), "WORLD_SIZE": "3"})
        for rank in range(3)
    ]
    for process in [worker_process, *ranks]:
        process.join(120)
        assert process.exitcode == 0
    assert files(tmp_path / "workers") == files(tmp_path / "ranks") == files(prepared_folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_any_moment_and_run_again_the_files_are_the_same(
    chain: Path, records: list[Path], prepared_folder: Path, tmp_path: Path, workers: int
) -> None:
    generator = random.Random(workers)
    out = tmp_path / "out"
    arguments = [*make_flags(chain, records, out), "--workers", str(workers)]
    shards = read_manifest(prepared_folder, "sequences")["shards"]
    for _ in range(2):
        num_shards = len(list(out.glob("*.arrow")))
        process = run(arguments, {})
        while process.is_alive() and len(list(out.glob("*.arrow"))) <= num_shards:
            time.sleep(0.001)
        time.sleep(generator.random() * 0.01)
        process.kill()
        process.join()
        assert len(list(out.glob("*.arrow"))) > num_shards or len(list(out.glob("*.arrow"))) == len(shards)
    old_times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.arrow")}
    process = run(arguments, {})
    process.join(120)
    assert process.exitcode == 0
    assert files(out) == files(prepared_folder)
    assert {name: (out / name).stat().st_mtime_ns for name in old_times} == old_times


def test_only_files_whose_records_changed_are_made_anew(
    chain: Path, records: list[Path], tmp_path: Path
) -> None:
    text = tmp_path / "words.jsonl"
    text.write_text(records[1].read_text())
    job = options(chain, [records[0], text], tmp_path / "out")
    prepare(job)
    times = {path.name: path.stat().st_mtime_ns for path in job.out.glob("*.arrow")}
    lines = text.read_text().splitlines()[:-10]
    text.write_text("\n".join(lines))
    prepare(job)
    first = len(read(records[:1])) // 7
    new_times = {path.name: path.stat().st_mtime_ns for path in job.out.glob("*.arrow")}
    assert len(new_times) < len(times)
    assert [times[name] == new_times[name] for name in sorted(new_times)] == [
        n < first for n in range(len(new_times))
    ]
    assert read_manifest(job.out, "sequences")["records"] == len(read([records[0], text]))
    last_times = {path: path.stat().st_mtime_ns for path in job.out.iterdir()}
    prepare(job)
    assert {path: path.stat().st_mtime_ns for path in job.out.iterdir()} == last_times


def test_a_file_has_the_category_of_those_of_its_records_that_name_none(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another category is another job; a record's own wins."""
    items = json.loads((chain / "data" / "text.json").read_text())[:4]
    for item in items:
        item.pop("category", None)
    items[1]["category"], items[2]["category"] = "reasoning", None
    for name in ("one.json", "two.jsonl", "three.json"):
        text = json.dumps(items) if name.endswith(".json") else "\n".join(map(json.dumps, items))
        (tmp_path / name).write_text(text)
    files = [
        {"path": tmp_path / "one.json", "category": "chat"},
        RecordFile(tmp_path / "two.jsonl", "perception"),
        str(tmp_path / "three.json"),
    ]
    prepare(options(chain, files, tmp_path / "out"))
    groups = {}
    for file, category in (("one", "chat"), ("two", "perception"), ("three", "foundation")):
        groups |= {f"{category}/{file}": 3, f"reasoning/{file}": 1}
    builder = SequenceBuilder.from_model(chain / "tied", chain / "grids")
    lengths = PreparedSequences(tmp_path / "out", builder).lengths
    assert {f"{group.category}/{group.source}": len(lengths[group]) for group in lengths} == groups
    with pytest.raises(FingerprintError, match=r"records was .*'chat'.*, is .*'reasoning'"):
        prepare(options(chain, [files[0] | {"category": "reasoning"}, *files[1:]], tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"category of .*one.json is 'speech'; expected one of foundation"):
        options(chain, [files[0] | {"category": "speech"}], tmp_path / "other")
    flags = ["--records", json.dumps({"path": str(tmp_path / "one.json"), "category": "speech"})]
    command = ["prepare", "--model", chain / "tied", *flags, "--out", tmp_path / "other"]
    assert "is 'speech'; expected one of foundation" in expect_refusal(capsys, being_vl(*command))


def test_a_training_of_other_categories_is_another_one(chain: Path, tmp_path: Path) -> None:
    """What was prepared follows the category; a folder that was prepared has its own."""
    items = [item | {"category": None} for item in json.loads((chain / "data" / "text.json").read_text())]
    (tmp_path / "a.json").write_text(json.dumps(items))
    training = TrainOptions(chain / "tied", [tmp_path / "a.json"], tmp_path / "run", chain / "grids")
    categories = []
    for category in (None, "reasoning"):
        training.records = [RecordFile(tmp_path / "a.json", category)]
        categories.append({group.category for group in load_sequences(training).lengths})
        assert training_fingerprint(training, 1)["records_categories"] == [category]
    assert categories == [{"foundation"}, {"reasoning"}]
    training.records = [RecordFile(tmp_path / "run" / "prepared", "reasoning")]
    with pytest.raises(ConfigError, match="was prepared before"):
        load_sequences(training)


def test_another_vocabulary_is_refused_unless_it_has_a_folder_of_its_own(
    chain: Path, records: list[Path], prepared_folder: Path, tmp_path: Path
) -> None:
    from being_vl import VisualBPE
    from being_vl.model.expand import expand
    from being_vl.model.options import ExpandOptions

    VisualBPE.load(chain / "vocabulary.json").truncate(20).save(tmp_path / "vocabulary.json")
    expand(
        ExpandOptions(
            str(chain / "llm"), tmp_path / "vocabulary.json", tmp_path / "model", str(chain / "quantizer")
        )
    )
    old_files = files(prepared_folder)
    other_options = options(chain, records, prepared_folder)
    other_options.model = tmp_path / "model"
    with pytest.raises(FingerprintError, match=r"other options or inputs \(vocabulary was .*another output"):
        prepare(other_options)
    with pytest.raises(FingerprintError, match="max_length was 512, is 100"):
        prepare(options(chain, records, prepared_folder, max_length=100))
    assert files(prepared_folder) == old_files
    other_options.out = tmp_path / "out"
    prepare(other_options)
    num_tokens = read_manifest(other_options.out, "sequences")["tokens"]
    assert num_tokens > read_manifest(prepared_folder, "sequences")["tokens"]
    with pytest.raises(FingerprintError, match="made for another model"):
        PreparedSequences(prepared_folder, tiny.builder(other_options))


def write_hostile_records(chain: Path, folder: Path) -> tuple[Path, dict[str, int]]:
    """A file with each kind of bad record once, and the number of each."""
    items = json.loads((chain / "data" / "train.json").read_text())[:30]
    first = items[0]
    turns = first["conversations"]
    changes = {
        "unknown category": {"category": "perceptoin"},
        "image markers": {"image": [first["image"], items[1]["image"]]},
        "odd turns": {"conversations": [*turns, turns[0]]},
        "empty answer": {"conversations": [turns[0], {"from": "gpt", "value": ""}]},
        "missing image": {"image": "nowhere.png"},
        "wrong encoding": {"conversations": [turns[0], {"from": "gpt", "value": "half \ud83d"}]},
        "too long": {"conversations": [turns[0], {"from": "gpt", "value": "Red. " * 2000}]},
        "malformed record": {"conversations": 3},
    }
    places = {}
    for number, (kind, change) in enumerate(changes.items()):
        items[3 * number] = first | change | {"id": kind}
        places[kind] = 3 * number
    lines = [json.dumps(item).encode() for item in items]
    lines += [b'{"id": "\xe9"}', b'{"id": ']
    places["not JSON"] = len(lines) - 1
    path = folder / "hostile.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path, places


def test_bad_records_are_named_and_reported_by_kind(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path, places = write_hostile_records(chain, tmp_path)
    out = tmp_path / "out"
    line = expect_refusal(capsys, being_vl("prepare", *make_flags(chain, [path], out)))
    assert line.startswith("being-vl: error: 10 of 32 records have faults (2 wrong encoding, ")
    assert f"see {out / LEFT_OUT}" in line
    assert line.endswith("mend them, or set lenient")
    faults = [json.loads(line) for line in (out / LEFT_OUT).read_text().splitlines()]
    assert Counter(fault["kind"] for fault in faults) == dict.fromkeys(places, 1) | {"wrong encoding": 2}
    for fault in faults:
        assert fault["name"].startswith(f"{path}: record ")
        if fault["kind"] != "wrong encoding":
            assert fault["name"].startswith(f"{path}: record {places[fault['kind']]}")
    assert "too long: 1 of 32 records" in caplog.text
    with pytest.raises(RecordError, match="10 of 32 records have faults"):
        prepare(options(chain, [path], out))
    old_files = files(out)
    prepare(options(chain, [path], out, lenient=True))
    assert files(out) == old_files
    manifest = read_manifest(out, "sequences")
    assert (manifest["records"], manifest["sequences"]) == (32, 22)
    assert sum(manifest["faults"].values()) == 10
    builder = tiny.builder(options(chain, [path], out))
    assert sum(map(len, PreparedSequences(out, builder).lengths.values())) == 22


def to_chat(record: dict[str, Any]) -> dict[str, Any]:
    """A record of LLaVA JSON as one of chat data."""
    roles = {"human": "user", "gpt": "assistant"}
    turns = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
    fields = {"id": record["id"], "category": record["category"]}
    return {**fields, "images": record["image"], "messages": turns}


def write_records(path: Path, items: list[dict[str, Any]]) -> None:
    """A file of records of the kind that its name says."""
    if path.suffix == ".json":
        path.write_text(json.dumps(items))
    elif path.suffix == ".jsonl":
        lines = map(to_chat, items) if path.stem == "messages" else items
        path.write_text("\n".join(map(json.dumps, lines)))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(items), path, row_group_size=3)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(items)
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    else:
        with tarfile.open(path, "w") as tar:
            for number, item in enumerate(items):
                member = tarfile.TarInfo(f"{number}.json")
                data = json.dumps(item).encode()
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


FILES = ["llava.json", "llava.jsonl", "messages.jsonl", "rows.parquet", "rows.arrow", "web.tar"]


@pytest.mark.parametrize("name", FILES)
def test_markers_and_images_that_differ_in_number_are_a_fault_in_every_kind_of_file(
    chain: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, *_ = json.loads((chain / "data" / "train.json").read_text())
    first_name, second_name = first["image"], second["image"]
    question, answer = first["conversations"][:2]
    texts = {
        text: [question | {"value": text}, answer] for text in ("What?", "<image>\nWhat?", "<image><image>")
    }
    items = [
        first | {"image": images, "conversations": texts[text]}
        for images, text in [
            ([first_name], "<image>\nWhat?"),
            ([first_name], "What?"),
            ([first_name, second_name], "<image>\nWhat?"),
            ([first_name], "<image><image>"),
            ([], "<image>\nWhat?"),
            ([], "What?"),
            ([first_name, second_name], "What?"),
            ([first_name, second_name], "<image><image>"),
        ]
    ]
    path = tmp_path / name
    write_records(path, items)

    def faults(out: Path) -> list[str]:
        listed_faults = [json.loads(line) for line in (out / LEFT_OUT).read_text().splitlines()]
        assert {fault["kind"] for fault in listed_faults} <= {"image markers"}
        return [fault["name"].removeprefix(f"{path}: record ")[0] for fault in listed_faults]

    out = tmp_path / "out"
    line = expect_refusal(capsys, being_vl("prepare", *make_flags(chain, [path], out)))
    assert "5 of 8 records have faults (5 image markers;" in line
    assert f"first: {path}: record 1 (id '{first['id']}'): 0 <image> in '" in line
    assert being_vl("prepare", *make_flags(chain, [path], out), "--lenient", "true") == 0
    assert faults(out) == ["1", "2", "3", "4", "6"]
    model = ["--model", chain / "tied", "--grids", chain / "grids", "--show", 0, "--records", path]
    command = ["check", *model, "--out", tmp_path / "run"]
    line = expect_refusal(capsys, being_vl(*command))
    assert "5 records with faults, 62.50% of all, are more than the tolerance" in line
    assert faults(tmp_path / "run" / "prepared") == ["1", "2", "3", "4", "6"]
    line = expect_refusal(capsys, being_vl("train", *model[:4], *model[6:], "--out", tmp_path / "run"))
    assert "5 of 8 records have faults (5 image markers;" in line
    capsys.readouterr()
    flags = ["--sequences.images_in_front", "true", "--out", tmp_path / "front", "--tolerance", 0.5]
    assert being_vl(*command[:-2], *flags) == 0
    assert "image markers: 3 of 8 records" in capsys.readouterr().out
    assert faults(tmp_path / "front" / "prepared") == ["2", "3", "4"]
    sequences = PreparedSequences(tmp_path / "front" / "prepared", tiny.builder(options(chain, [path], out)))
    sequence_with_one_marker, sequence_without_marker, _, other_without_marker, other_with_marker = map(
        sequences.read, range(5)
    )
    assert sequence_without_marker.ids.tolist() == sequence_with_one_marker.ids.tolist()
    assert (
        [image.key for image in other_without_marker.images]
        == [image.key for image in other_with_marker.images]
        == [first_name, second_name]
    )


def test_records_that_were_dropped_or_truncated_are_no_fault_but_listed(
    chain: Path, records: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    builder = tiny.builder(options(chain, records, tmp_path))
    lengths = sorted(len(sequence.ids) for sequence in builder.build(read(records)))
    limit = lengths[len(lengths) // 2]
    counts = {}
    for too_long in ("drop", "truncate"):
        out = tmp_path / too_long
        prepare(options(chain, records, out, max_length=limit, too_long=too_long))
        manifest = read_manifest(out, "sequences")
        counts[too_long] = manifest["faults"]
        assert manifest["sequences"] == manifest["records"] - manifest["faults"]["dropped as too long"]
        shorter_builder = tiny.builder(options(chain, records, out, max_length=limit, too_long=too_long))
        assert max(map(max, PreparedSequences(out, shorter_builder).lengths.values())) <= limit
        listed_faults = [json.loads(line)["kind"] for line in (out / LEFT_OUT).read_text().splitlines()]
        assert Counter(listed_faults) == manifest["faults"]
    assert counts["drop"] == {"dropped as too long": sum(length > limit for length in lengths)}
    assert sum(counts["truncate"].values()) == counts["drop"]["dropped as too long"]
    assert counts["truncate"]["truncated"] > 0
    with pytest.raises(
        RecordError, match=rf"none of {len(lengths)} records is left \(\d+ dropped as too long;"
    ):
        prepare(options(chain, records, tmp_path / "none", max_length=3, too_long="drop"))


def test_the_last_line_accounts_for_every_record(
    chain: Path, records: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = write_hostile_records(chain, tmp_path)
    out = tmp_path / "out"
    with pytest.raises(RecordError, match="10 of 32 records have faults"):
        prepare(options(chain, [path], out))
    account = "records: 32 seen, 22 used, 10 left out (2 wrong encoding, 1 "
    lines = [caplog.messages[-1]]
    assert any("read 32 of 32 records, left out 10;" in message for message in caplog.messages)
    for _ in range(2):  # the second time it is finished
        caplog.clear()
        prepare(options(chain, [path], out, lenient=True))
        lines.append(caplog.messages[-1])
    assert lines[0].startswith(account)
    assert lines == lines[:1] * 3
    assert Account.from_json(read_manifest(out, "sequences")["account"]).describe() == lines[0]
    entries = [json.loads(line) for line in (out / LEFT_OUT).read_text().splitlines()]
    assert len(entries) == 10
    assert all(set(entry) == {"name", "kind", "reason"} for entry in entries)
    assert {entry["name"].partition(" (id")[0] for entry in entries} <= {
        f"{path}: record {n}" for n in range(32)
    }
    assert not any(str(path) in entry["reason"] for entry in entries)


def test_records_that_were_cut_are_used_but_told(
    chain: Path, records: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    builder = tiny.builder(options(chain, records, tmp_path))
    lengths = sorted(len(sequence.ids) for sequence in builder.build(read(records)))
    out = tmp_path / "out"
    prepare(options(chain, records, out, max_length=lengths[len(lengths) // 2], too_long="truncate"))
    manifest = read_manifest(out, "sequences")
    num_cut, num_dropped = (manifest["faults"].get(kind, 0) for kind in ("truncated", "dropped as too long"))
    assert num_cut > 0
    assert f"truncated: {num_cut} of {len(lengths)} records" in caplog.text
    assert manifest["account"]["used"] == len(lengths) - num_dropped
    assert "truncated" not in manifest["account"]["left_out"]
    assert caplog.messages[-1].startswith(f"records: {len(lengths)} seen, {len(lengths) - num_dropped} used")


def test_dropout_is_a_function_of_seed_and_position(
    chain: Path, records: list[Path], prepared_folder: Path
) -> None:
    builder = tiny.builder(options(chain, records, prepared_folder))
    plain_sequences = PreparedSequences(prepared_folder, builder)
    group = RecordGroup("perception", "train", False)
    num_longer = 0
    readings: dict[tuple[int, int], list[list[int]]] = {}
    for seed in (0, 1):
        for position in (0, 1, 2**40):
            sequences = PreparedSequences(prepared_folder, builder, dropout=0.5, seed=seed)
            group_sequences = [sequences.get(group, index, position) for index in range(5)]
            reversed_sequences = [sequences.get(group, index, position) for index in reversed(range(5))]
            readings[seed, position] = [sequence.ids.tolist() for sequence in group_sequences]
            assert [sequence.ids.tolist() for sequence in reversed(reversed_sequences)] == readings[
                seed, position
            ]
            for index, sequence in enumerate(group_sequences):
                equal_text = plain_sequences.get(group, index, position)
                assert sequence.labels[sequence.labels >= 0].tolist() == [
                    label for label in equal_text.labels.tolist() if label >= 0
                ]
                num_longer += len(sequence.ids) > len(equal_text.ids)
    assert num_longer > 0
    assert len({json.dumps(reading) for reading in readings.values()}) == len(readings)
    words = RecordGroup("chat", "words", True)
    sequences = PreparedSequences(prepared_folder, builder, dropout=0.5)
    assert_equal(sequences.get(words, 3, 7), plain_sequences.get(words, 3, 7))
    builder.grids = None
    with pytest.raises(ConfigError, match="dropout needs"):
        PreparedSequences(prepared_folder, builder, dropout=0.5)


def test_grids_of_another_quantizer_are_refused(chain: Path, records: list[Path], tmp_path: Path) -> None:
    other_quantizer = tiny.quantizer(tmp_path / "quantizer", codebook_size=64, name="other", seed=3)
    job = options(chain, records, tmp_path / "out")
    job.grids = [tmp_path / "grids"]
    tiny.grids(job.grids[0], ["a.png"], other_quantizer)
    with pytest.raises(QuantizerError, match="'other'"):
        prepare(job)


def test_a_damaged_or_unfinished_folder_is_named(
    chain: Path, records: list[Path], prepared_folder: Path, tmp_path: Path
) -> None:
    import shutil

    builder = tiny.builder(options(chain, records, prepared_folder))
    folder = tmp_path / "copy"
    shutil.copytree(prepared_folder, folder)
    shard = folder / "sequences-00002.arrow"
    shard_bytes = shard.read_bytes()
    for content in (b"", shard_bytes[: len(shard_bytes) // 2], b"nonsense" * 100):
        shard.write_bytes(content)
        with pytest.raises(
            ManifestError, match=r"sequences-00002\.arrow: was changed after it had been written"
        ):
            PreparedSequences(folder, builder)
    shutil.copy(folder / "sequences-00000.arrow", shard)
    shutil.copy(folder / "sequences-00013.arrow", folder / "sequences-00000.arrow")
    (folder / "manifest.json").unlink()
    with pytest.raises(ManifestError, match=r"no manifest\.json"):
        PreparedSequences(folder, builder)
