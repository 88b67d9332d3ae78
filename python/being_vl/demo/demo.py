"""`being-vl demo`: the whole chain on built-in data, on a CPU."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from being_vl.data.options import RecordFile, SequenceOptions
from being_vl.demo import shapesworld
from being_vl.demo.drawings import DrawingsOptions, draw_all
from being_vl.demo.exam import ExamOptions, KindScores, table, take_exam
from being_vl.demo.llm import TinyLlamaOptions, make_llama
from being_vl.demo.options import DemoOptions
from being_vl.demo.photos import PhotosOptions, draw_photographs
from being_vl.options import Options
from being_vl.outputs import claim_folder, free_locks
from being_vl.recipes.options import RunOptions
from being_vl.recipes.recipe import FOLDER, Recipe
from being_vl.run import Step, Steps, run
from being_vl.shards.grids import GridStore
from being_vl.tokenizer import VisualBPE
from being_vl.training.options import (
    BatchOptions,
    OptimizerOptions,
    PrecisionOptions,
    StageOptions,
    TrainOptions,
)

MAX_THREADS = 4
"""A model this small gains nothing from more."""

TEXT_TRAINING: dict[str, Any] = {
    "sequences": SequenceOptions(max_length=256),
    "batches": BatchOptions(micro_batch_size=16),
    "optimizer": OptimizerOptions(betas=(0.9, 0.98)),
    "precision": PrecisionOptions(dtype="fp32"),
}
"""What the training on text shares with the recipe."""


@dataclass(frozen=True)
class Size:
    """How much the demo does: numbers of pictures and scenes, and optimizer steps."""

    pictures: int
    text_scenes: int
    held_out_pictures: int
    text_steps: int
    stage_steps: tuple[int, int, int] | None


FULL_SIZE = Size(pictures=6000, text_scenes=4000, held_out_pictures=400, text_steps=1000, stage_steps=None)
QUICK_SIZE = Size(
    pictures=200, text_scenes=200, held_out_pictures=24, text_steps=20, stage_steps=(10, 10, 20)
)


@dataclass
class DataOptions(Options):
    """Options of making the demo's data.

    Args:
        out: Folder in which `train/`, `held-out/` and `text/` are made.
        pictures: Training pictures.
        text_scenes: Scenes described in words.
        held_out_pictures: Held-out pictures.
        seed: Seed of all of them.
    """

    out: Path
    pictures: int
    text_scenes: int
    held_out_pictures: int
    seed: int


def make_data(options: DataOptions) -> None:
    """Draw the pictures and write the records."""
    shapesworld.generate(options.out / "train", options.pictures, options.seed)
    shapesworld.generate(options.out / "held-out", options.held_out_pictures, options.seed, "held-out")
    shapesworld.generate_text(options.out / "text", options.text_scenes, options.seed)


@free_locks()
def demo(options: DemoOptions) -> Path:
    """Run the chain, print its results, and draw figures of them.

    Run again, finished steps are skipped.

    Returns:
        The folder of the trained model.

    Raises:
        FingerprintError: if `options.out` holds a demo of another size or seed, and `overwrite` is not set.
        OutputError: if it holds anything else, or another process is writing there.
    """
    from being_vl.training.engine import train  # takes seconds to import

    torch.set_num_threads(min(MAX_THREADS, torch.get_num_threads()))
    claim_folder(options.out, "demo")
    out, size = options.out, QUICK_SIZE if options.quick else FULL_SIZE
    steps = Steps(out, options.overwrite)
    # Pictures, and an LLM that has only read text.
    data = DataOptions(out, size.pictures, size.text_scenes, size.held_out_pictures, options.seed)
    steps.do(Step("data", make_data, data))
    llama = TinyLlamaOptions(out / "text" / "text.json", out / "text" / "untrained", seed=options.seed)
    steps.do(Step("llm", make_llama, llama))
    steps.do(Step("text", train, text_options(llama, size, options)))
    # The same chain as for one's own images.
    model = run(run_options(size, options))
    # What it has learned.
    steps.do(
        Step("exam", take_exam, ExamOptions(model, out / "held-out", out / "exam", size.held_out_pictures))
    )
    steps.do(
        Step("photographs", draw_photographs, PhotosOptions(out / "vocabulary.json", out / "photographs"))
    )
    steps.do(Step("drawings", draw_all, DrawingsOptions(out, out / "drawings")))
    print(summary(out, model))
    return model


def text_options(llama: TinyLlamaOptions, size: Size, options: DemoOptions) -> TrainOptions:
    """The training on text alone that stands for an LLM's pretraining."""
    mixture = {"foundation": 20.0, "perception": 50.0, "reasoning": 15.0, "instruction": 15.0}
    stage = StageOptions(
        "pretrained", "all", 2e-3, mixture, accumulation=2, warmup=0.05, max_steps=size.text_steps
    )
    return TrainOptions(
        llama.out,
        [RecordFile(llama.records)],
        options.out / "text" / "training",
        stages=[stage],
        seed=options.seed,
        overwrite=options.overwrite,
        **TEXT_TRAINING,
    )


def run_options(size: Size, options: DemoOptions) -> RunOptions:
    """The packaged recipe with its paths in the demo's folder."""
    out, seed = options.out, options.seed
    flags = ["--images", out / "train" / "images", "--records", out / "train" / "train.json"]
    flags += [
        "--llm",
        out / "text" / "training" / "pretrained",
        "--out",
        out,
        "--train.seed",
        seed,
        "--expand.seed",
        seed,
    ]
    flags += ["--overwrite"] * options.overwrite
    recipe = Recipe.find(FOLDER / "demo.yaml").run([str(word) for word in flags])
    if size.stage_steps:
        stages = zip(recipe.train.stages, size.stage_steps, strict=True)
        recipe.train.stages = [replace(stage, max_steps=steps) for stage, steps in stages]
    return recipe


def summary(out: Path, model: Path) -> str:
    """The results of a finished demo, to be printed."""
    scores = [KindScores(**fields) for fields in _read_json(out / "exam" / "results.json")]
    # Cells and tokens per picture, and of the photographs.
    grids = list(GridStore.open(out / "grids").values())[:1000]
    cells = np.mean([grid.size for grid in grids])
    tokens = len(VisualBPE.load(out / "vocabulary.json").encode_batch(grids).values) / len(grids)
    photos = _read_json(out / "photographs" / "photographs.json").values()
    photo_ratio = sum(photo["tokens"] for photo in photos) / sum(photo["cells"] for photo in photos)
    # Steps in the order in which they were finished.
    step_files = sorted((out / "steps").glob("*.json"), key=lambda file: file.stat().st_mtime)
    seconds = {file.stem: _read_json(file)["seconds"] for file in step_files}
    times = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    return f"""
Held-out pictures, per cent right
{table(scores)}

swapped        the same model with the tokens of another picture
majority       always the most frequent answer to that kind of question
random object  the asked attribute of a random object of the right picture, or one of the two in the question

Tokens per picture: {cells:.0f} before visual BPE, {tokens:.1f} after; the shipped photographs keep
{photo_ratio:.0%} of theirs with a vocabulary of their own.

Seconds per step: {times}; in all {sum(seconds.values()):.0f}

{out}/
  train/ held-out/ text/   pictures, records, and the LLM that was trained on text alone
  grids/ vocabulary.json   ids of the pictures, and the visual BPE learned from them
  expanded/                the LLM with rows for the visual tokens
  training/                a plain Hugging Face model per stage, log.jsonl, TensorBoard
  exam/                    results.json, results.md, answers.jsonl: every question and answer
  drawings/                reconstructions, tokens, losses, held-out pictures with what the model said
  photographs/             the shipped photographs, and what their tokens give back

To try next:
  being-vl generate --model {model} --image {out}/held-out/images/held-out-00000.png --prompt "describe the picture."
  tensorboard --logdir {out}/training
  being-vl run RECIPE      the same chain on images and records of your own: docs/guide/run.md
"""


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
