"""`being-vl check` on the chain of the other tests."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from being_vl.cli import main
from being_vl.data.options import RecordFile, SequenceOptions
from being_vl.errors import FingerprintError
from being_vl.training.check import check
from being_vl.training.engine import load_sequences, plan_training
from being_vl.training.options import CheckOptions, StageOptions, TrainOptions, paper_stages
from helpers import tiny


@pytest.fixture
def recipe(chain: Path, tmp_path: Path) -> Path:
    stage = {
        "name": "one",
        "unfreeze": 0.0,
        "learning_rate": 1e-3,
        "mixture": {"foundation": 1, "perception": 3},
    }
    options = {
        **tiny.training_inputs(chain),
        "out": str(tmp_path / "run"),
        "batches": {"micro_batch_size": 2},
        "stages": [{**stage, "max_steps": 10, "accumulation": 2}],
    }
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def test_check_shows_records_counts_and_stages(
    chain: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--recipe", str(recipe), "--show", "1", "--ranks", "3"]) == 0
    report = capsys.readouterr().out
    records = json.loads((chain / "data" / "train.json").read_text())
    first = records[0]
    assert report.startswith(f"{first['category']}: {chain / 'data' / 'train.json'}: record 0 ")
    assert f"[image {first['image']}]" in report.splitlines()[1]
    for turn in first["conversations"][1::2]:
        assert f"⟦ {turn['value']}" in report or f"⟦{turn['value']}" in report
    start = report.index(f"[image {first['image']}]: ")
    title, *rows = report[start:].partition("\n\n")[0].splitlines()
    assert title.split()[2] == str(sum(map(len, rows)))
    assert len({len(row) for row in rows}) == 1
    table = {line.split()[0]: line.split()[1:] for line in report.splitlines() if line[:1].isalpha()}
    for category in {record["category"] for record in records}:
        count = sum(record["category"] == category for record in records)
        assert table[category][:2] == [f"{count:,}", f"{count / len(records):.1%}"]
        assert float(table[category][4].replace(",", "")) >= float(table[category][5].replace(",", ""))
    assert table["one"][:2] == ["10", "120"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["prepared"]
    folder = tmp_path / "run" / "prepared"
    assert (
        main(["check", "--recipe", str(recipe), "--show", "1", "--ranks", "3", "--records", str(folder)]) == 0
    )
    assert capsys.readouterr().out == report


def bad_records(chain: Path, folder: Path) -> tuple[Path, int]:
    """A file of records of which record 3 has an image without a grid and record 5 a wrong category; their number."""
    records = json.loads((chain / "data" / "train.json").read_text())
    records[3]["image"] = "nowhere.png"
    records[5]["category"] = "other"
    path = folder / "bad.json"
    path.write_text(json.dumps(records))
    return path, len(records)


def test_check_lists_faults_and_fails_above_the_tolerance(
    chain: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, count = bad_records(chain, tmp_path)
    command = ["check", "--recipe", str(recipe), "--records", str(path), "--show", "0"]
    assert main(command) == 2
    report, error = capsys.readouterr()
    assert f"unknown category: 1 of {count} records" in report
    assert f"missing image: 1 of {count} records" in report
    assert "bad.json: record 5 " in report
    assert "bad.json: record 3 " in report
    assert f"2 records with faults, {2 / count:.2%} of all" in error
    assert main([*command, "--tolerance", "0.5"]) == 0


def test_a_wrong_option_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--recipe", str(recipe), "--tolerance", "2"]) == 2
    assert "tolerance 2.0; expected" in capsys.readouterr().err


def test_lenient_training_leaves_out_bad_records_and_lists_them(
    chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, count = bad_records(chain, tmp_path)
    options = TrainOptions(
        chain / "tied",
        [path],
        tmp_path / "run",
        chain / "grids",
        sequences=SequenceOptions(max_length=10**9),
        lenient=True,
    )
    caplog.set_level("INFO", "being_vl")
    sequences = load_sequences(options)
    assert sum(map(len, sequences.lengths.values())) == count - 2
    (report,) = (message for message in caplog.messages if message.startswith("unknown category: 1 of"))
    assert report.count("bad.json: record") == 2
    assert any("is beyond the model's context, so it is" in message for message in caplog.messages)


def test_training_reads_a_prepared_folder_with_dropout_without_being_told_the_grids(
    chain: Path, recipe: Path, tmp_path: Path
) -> None:
    assert main(["check", "--recipe", str(recipe), "--show", "0"]) == 0
    options = TrainOptions(chain / "tied", [tmp_path / "run" / "prepared"], tmp_path / "other")
    plain = load_sequences(options)
    options.batches.bpe_dropout = 0.5
    shorter = load_sequences(options)
    group = next(group for group in plain.lengths if not group.text_only)
    assert len(shorter.get(group, 0, 5).ids) > len(plain.get(group, 0, 5).ids)
    options.seed = 1
    assert shorter.get(group, 0, 5).ids.tolist() != load_sequences(options).get(group, 0, 5).ids.tolist()
    shutil.copytree(chain / "grids", tmp_path / "grids")
    manifest = json.loads((tmp_path / "grids" / "manifest.json").read_text())
    (tmp_path / "grids" / "manifest.json").write_text(json.dumps(manifest | {"images": "others"}))
    options.grids = [tmp_path / "grids"]
    with pytest.raises(FingerprintError, match="was made from other grids"):
        load_sequences(options)


def write_plain_records(chain: Path, folder: Path) -> Path:
    """The chain's records as LLaVA has them, without a category."""
    items = json.loads((chain / "data" / "train.json").read_text())
    for item in items:
        item.pop("category", None)
    path = folder / "llava.json"
    path.write_text(json.dumps(items))
    return path


def gap_options(
    chain: Path, out: Path, records: list[Any], mixtures: list[dict[str, float]], **changes: Any
) -> CheckOptions:
    stages = [
        StageOptions(f"s{number}", 0.0, 1e-3, mixture, max_steps=1) for number, mixture in enumerate(mixtures)
    ]
    return CheckOptions(chain / "tied", records, out, [chain / "grids"], stages=stages, show=0, **changes)


PAPER = [stage.mixture for stage in paper_stages()]


@pytest.mark.parametrize(
    ("category", "mixtures", "warnings"),
    [
        (
            None,
            PAPER,
            [
                "stage 's0': there are no records of perception (20%), which its mixture asks for; the other keys",
                "stage 's1': there are no records of perception (30%), reasoning (20%), instruction (10%), which",
                "stage 's2': there are no records of perception (15%), reasoning (30%), instruction (40%), which",
                "all records are of the category 'foundation', so the mixtures, which tell 4 categories apart, change",
            ],
        ),
        ("reasoning", [{"reasoning": 1}, {"reasoning": 2}], []),
        ("reasoning", [{}, {}], []),
        (
            "reasoning",
            [{"reasoning": 1, "perception": 0}, {"reasoning": 1, "instruction": 3}],
            [
                "stage 's1': there are no records of instruction (75%), which its mixture asks for; the other keys "
                "share that part: reasoning",
                "all records are of the category 'reasoning', so the mixtures, which tell 2 categories apart",
            ],
        ),
        ("instruction", [{"instruction/llava": 1}, {"instruction": 1}], []),
    ],
)
def test_mixtures_and_records_that_do_not_meet_are_told_loudly(
    category: str | None,
    mixtures: list[dict[str, float]],
    warnings: list[str],
    chain: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the report, and as warnings in the same words where a training is checked, planned or started."""
    file = RecordFile(write_plain_records(chain, tmp_path), category)
    options = gap_options(chain, tmp_path / "run", [file], mixtures)
    report = "\n".join(check(options)).splitlines()
    told = [line.removeprefix("warning: ") for line in report if line.startswith("warning: ")]
    assert len(told) == len(warnings)
    assert all(line.startswith(start) for line, start in zip(told, warnings, strict=True))
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == told
    caplog.clear()
    plan_training(options)
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == told


def test_records_that_no_stage_reads_are_counted(
    chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = write_plain_records(chain, tmp_path)
    count = len(json.loads(plain.read_text()))
    second = tmp_path / "second.json"
    shutil.copy(plain, second)
    files = [RecordFile(plain, "perception"), RecordFile(second, "reasoning")]
    for number, (mixtures, expected) in enumerate(
        [
            (
                [{"perception": 1}, {"perception": 2}],
                f"no stage reads {count:,} of the records: reasoning/second",
            ),
            ([{"perception": 1}, {"reasoning": 1}], None),
            (
                [{"perception": 1, "reasoning": 1, "reasoning/second": 0}],
                f"no stage reads {count:,} of the records: reasoning/second",
            ),
            ([{"perception": 1}, {}], None),
        ]
    ):
        caplog.clear()
        list(check(gap_options(chain, tmp_path / f"run{number}", files, mixtures)))
        lines = [line for line in caplog.messages if line.startswith("no stage reads")]
        assert lines == ([expected] if expected else [])


def test_many_sources_make_no_long_warning(
    chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = []
    items = json.loads(write_plain_records(chain, tmp_path).read_text())[:2]
    for number in range(30):
        path = tmp_path / f"source{number:02}.json"
        path.write_text(json.dumps(items))
        files.append(RecordFile(path, "perception" if number else "reasoning"))
    list(check(gap_options(chain, tmp_path / "run", files, [{"reasoning": 1}])))
    (line,) = [line for line in caplog.messages if line.startswith("no stage reads")]
    assert "58 of the records: perception/source01, perception/source02" in line
    assert line.endswith(" and 24 more")
