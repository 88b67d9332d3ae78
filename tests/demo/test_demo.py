"""The quick demo from end to end: every step, its output, and the second run."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from being_vl.cli import main
from being_vl.demo.llm import TinyLlamaOptions, make_llama, word_tokenizer
from being_vl.demo.shapesworld import generate_text

STEPS = ["data", "llm", "text", "quantize", "vocab", "expand", "train", "exam", "photographs", "drawings"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--quick", "true", "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_demo_makes_all_its_parts(demo: Path) -> None:
    seconds = {f.stem: json.loads(f.read_text())["seconds"] for f in (demo / "steps").iterdir()}
    assert seconds.keys() == set(STEPS)
    rows = json.loads((demo / "exam" / "results.json").read_text())
    assert {row["category"] for row in rows} == {"foundation", "perception", "reasoning", "instruction"}
    assert all(0 <= row["right"] <= 1 and 0 <= row["swapped"] <= 1 for row in rows)
    answers = [json.loads(line) for line in (demo / "exam" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == sum(row["questions"] for row in rows if row["kind"] in ("all", "caption"))
    for name in ("reconstructions", "tokens", "losses", "answers"):
        with Image.open(demo / "drawings" / f"{name}.png") as drawing:
            assert np.asarray(drawing.convert("L")).std() > 1
    photos = json.loads((demo / "photographs" / "photographs.json").read_text())
    assert len(photos) >= 5
    assert all(photo["grid_came_back"] and photo["tokens"] < photo["cells"] for photo in photos.values())


@pytest.mark.slow
def test_its_summary_says_what_came_out_and_where(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--quick", "true", "--out", str(demo)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\| foundation +\| caption: F1 of objects +\|", text)
    assert re.search(r"Tokens per picture: 64 before visual BPE, \d+\.\d after", text)
    assert re.search(r"Seconds per step: data \d+, llm \d+, .*train \d+, exam \d+, .*; in all \d+", text)
    for part in ("train/ held-out/ text/", "grids/ vocabulary.json", "training/", "exam/", "drawings/"):
        assert f"\n  {part} " in text
    assert f"being-vl generate --model {demo}/training/stage3 --image {demo}/held-out/images/" in text


@pytest.mark.slow
def test_a_second_run_does_nothing_again(demo: Path, caplog: pytest.LogCaptureFixture) -> None:
    times = {file: file.stat().st_mtime_ns for file in demo.rglob("*") if file.is_file()}
    with caplog.at_level(logging.INFO, "being_vl"):
        assert main(["demo", "--quick", "true", "--out", str(demo)]) == 0
    assert sum("skipped" in record.message for record in caplog.records) == len(STEPS)
    assert {file: file.stat().st_mtime_ns for file in demo.rglob("*") if file.is_file()} == times


@pytest.mark.slow
def test_another_seed_needs_another_folder(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--quick", "true", "--seed", "1", "--out", str(demo)]) == 2
    assert "seed" in capsys.readouterr().err


def test_the_tiny_llama_knows_its_words(tmp_path: Path) -> None:
    generate_text(tmp_path, 30)
    tokenizer = word_tokenizer(tmp_path / "text.json")
    ids = tokenizer("What is the colour of the circle?").input_ids
    assert tokenizer.decode(ids) == "what is the colour of the circle"
    assert (
        tokenizer.decode(tokenizer("a red circle, a blue square.").input_ids)
        == "a red circle, a blue square."
    )
    assert tokenizer("giraffe").input_ids == [tokenizer.unk_token_id]
    options = TinyLlamaOptions(tmp_path / "text.json", tmp_path / "llm", hidden_size=48, layers=2)
    make_llama(options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    assert model.config.vocab_size == len(tokenizer)
    logits = model(torch.tensor([ids])).logits
    assert logits.shape == (1, len(ids), len(tokenizer))
    assert torch.isfinite(logits).all()
