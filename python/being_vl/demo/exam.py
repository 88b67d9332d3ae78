"""The demo's exam: a trained model is asked about held-out pictures, beside three controls."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from being_vl.data.records import PLACEHOLDER, Turn
from being_vl.demo.scoring import exact_match, majority_share, set_f1
from being_vl.demo.shapesworld import Scene, named_objects, read_scenes
from being_vl.files import write_aside, write_json
from being_vl.model.assistant import Assistant

LONGEST_ANSWER = 32
BATCH = 128
ATTRIBUTES = {
    "colour": "colour",
    "shape": "shape",
    "size": "size",
    "texture": "texture",
    "its size": "size",
    "its texture": "texture",
}
"""Kinds of question that ask for an attribute of an object."""
ONE_OF_TWO = ("larger", "higher", "further left")
"""Kinds of question that name two objects, of which one is the answer."""


@dataclass
class ExamOptions:
    """Options of the exam.

    Args:
        model: Folder of the trained model.
        pictures: Folder of held-out pictures that `shapesworld.generate` wrote.
        out: Folder for `results.json`, `results.md` and `answers.jsonl`.
        count: Number of pictures, at most.
    """

    model: Path
    pictures: Path
    out: Path
    count: int = 400


@dataclass(frozen=True)
class Row:
    """Scores of one kind of question, as shares from 0 to 1: accuracy, or for captions the F1 of objects.

    Args:
        category: The records' category.
        kind: Kind of question; `all` for the category as a whole.
        questions: Number of questions.
        right: Score with the right picture.
        swapped: Score of the same model with the tokens of another picture.
        majority: Always the most frequent answer to this kind of question.
        random_object: The asked attribute of a random object of the right picture; where the question names two
            objects, a random one of these.
    """

    category: str
    kind: str
    questions: int
    right: float
    swapped: float
    majority: float | None = None
    random_object: float | None = None


@dataclass(frozen=True)
class _Talk:
    """Questions that are asked one after the other, about one picture."""

    category: str
    image: str
    questions: tuple[str, ...]
    kinds: tuple[str, ...]
    references: tuple[str, ...]


@dataclass(frozen=True)
class Answered:
    """One question with the answers to it, given the right and another picture."""

    category: str
    kind: str
    image: str
    question: str
    reference: str
    right: str
    swapped: str


def take_exam(options: ExamOptions) -> None:
    """Ask the model, score its answers, and write results and answers."""
    scenes = read_scenes(options.pictures / "held-out-scenes.json")
    names = list(scenes)[: options.count]
    talks = list(_talks(options.pictures / "held-out.json", set(names)))
    assistant = Assistant.load(options.model, device="cpu")
    grids = dict(
        zip(
            names,
            assistant.quantizer.encode([_picture(options.pictures, name) for name in names]),
            strict=True,
        )
    )
    others = dict(zip(names, names[len(names) // 2 :] + names[: len(names) // 2], strict=True))
    right = _ask(assistant, talks, [grids[talk.image] for talk in talks])
    swapped = _ask(assistant, talks, [grids[others[talk.image]] for talk in talks])
    answered = [
        Answered(talk.category, kind, talk.image, question, reference, r, s)
        for talk, rights, swaps in zip(talks, right, swapped, strict=True)
        for kind, question, reference, r, s in zip(
            talk.kinds, talk.questions, talk.references, rights, swaps, strict=True
        )
    ]
    rows = score(answered, scenes)
    options.out.mkdir(parents=True, exist_ok=True)
    with write_aside(options.out / "answers.jsonl") as path:
        path.write_text("".join(json.dumps(asdict(answer)) + "\n" for answer in answered), encoding="utf-8")
    with write_aside(options.out / "results.md") as path:
        path.write_text(table(rows) + "\n", encoding="utf-8")
    write_json(options.out / "results.json", [asdict(row) for row in rows])


def score(answered: Sequence[Answered], scenes: dict[str, Scene]) -> list[Row]:
    """Per category, and per kind of question in it: scores of the right picture and of the controls."""
    groups: dict[tuple[str, str], list[Answered]] = {}
    for answer in answered:
        kind = answer.kind
        if kind in ("colour", "shape"):
            kind += ", one object" if len(scenes[answer.image].things) == 1 else ", several objects"
        groups.setdefault((answer.category, kind), []).append(answer)
    rows = [_row(category, kind, found, scenes) for (category, kind), found in groups.items()]
    results = []
    for category in dict.fromkeys(row.category for row in rows):
        parts = sorted((row for row in rows if row.category == category), key=lambda row: row.kind)
        if len(parts) > 1:
            results.append(_whole(category, parts))
        results += parts
    return results


def _row(category: str, kind: str, found: list[Answered], scenes: dict[str, Scene]) -> Row:
    if kind == "caption":
        scores = [
            [set_f1(named_objects(text), named_objects(a.reference)) for a, text in pairs]
            for pairs in ([(a, a.right) for a in found], [(a, a.swapped) for a in found])
        ]
        return Row(category, kind, len(found), float(np.mean(scores[0])), float(np.mean(scores[1])))
    attribute = ATTRIBUTES.get(found[0].kind)
    chance = 0.5 if found[0].kind in ONE_OF_TWO else None
    if attribute:
        values = [[getattr(thing, attribute) for thing in scenes[a.image].things] for a in found]
        chance = float(np.mean([v.count(a.reference) / len(v) for v, a in zip(values, found, strict=True)]))
    return Row(
        category,
        kind,
        len(found),
        float(np.mean([exact_match(a.right, a.reference) for a in found])),
        float(np.mean([exact_match(a.swapped, a.reference) for a in found])),
        majority_share([a.reference for a in found]),
        chance,
    )


def _whole(category: str, parts: list[Row]) -> Row:
    """The category as a whole; its majority answers each kind of question with that kind's majority."""
    questions = [row.questions for row in parts]

    def mean(name: str) -> float:
        return float(np.average([getattr(row, name) for row in parts], weights=questions))

    return Row(category, "all", sum(questions), mean("right"), mean("swapped"), mean("majority"))


def table(rows: Sequence[Row]) -> str:
    """The results as a Markdown table, in per cent."""

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.0f}"

    cells = [["category", "question", "number", "right picture", "swapped", "majority", "random object"]]
    for row in rows:
        kind = "caption: F1 of objects" if row.kind == "caption" else row.kind
        scores = [percent(s) for s in (row.right, row.swapped, row.majority, row.random_object)]
        cells.append([row.category, kind, str(row.questions), *scores])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = 2  # columns of text; the others are numbers
    lines = [
        " | ".join(
            cell.ljust(w) if n < left else cell.rjust(w)
            for n, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    rule = " | ".join("-" * w if n < left else "-" * (w - 1) + ":" for n, w in enumerate(widths))
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


def _picture(folder: Path, name: str) -> Image.Image:
    with Image.open(folder / "images" / name) as image:
        return image.convert("RGB")


def _talks(path: Path, names: set[str]) -> Iterator[_Talk]:
    """The records as talks: instructions as they are, other questions one at a time, so that none helps another."""
    for record in json.loads(path.read_text(encoding="utf-8")):
        if record["image"] not in names:
            continue
        texts = [turn["value"].replace(PLACEHOLDER, "").strip() for turn in record["conversations"]]
        questions, references, kinds = tuple(texts[::2]), tuple(texts[1::2]), tuple(record["kinds"])
        if record["category"] == "instruction":
            yield _Talk(record["category"], record["image"], questions, kinds, references)
        else:
            for question, kind, reference in zip(questions, kinds, references, strict=True):
                yield _Talk(record["category"], record["image"], (question,), (kind,), (reference,))


def _ask(
    assistant: Assistant, talks: Sequence[_Talk], grids: Sequence[NDArray[np.integer[Any]]]
) -> list[list[str]]:
    """Answers to all questions of all talks; a later question comes after the model's own earlier answers."""
    answers: list[list[str]] = [[] for _ in talks]
    for turn in range(max(len(talk.questions) for talk in talks)):
        asked = [n for n, talk in enumerate(talks) if len(talk.questions) > turn]
        prompts = []
        for n in asked:
            said = [
                side
                for question, answer in zip(talks[n].questions, answers[n], strict=False)
                for side in (Turn("user", question), Turn("assistant", answer))
            ]
            prompts.append([*said, Turn("user", talks[n].questions[turn])])
        given = assistant.answer(
            prompts, [[grids[n]] for n in asked], max_new_tokens=LONGEST_ANSWER, batch_size=BATCH
        )
        for n, text in zip(asked, given, strict=True):
            answers[n].append(text)
    return answers
