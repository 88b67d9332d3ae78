"""The demo's exam: a trained model is asked about held-out pictures, beside three controls."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from being_vl.data.records import PLACEHOLDER, Turn
from being_vl.demo.scoring import exact_match, majority_share, set_f1
from being_vl.demo.shapesworld import Scene, find_objects, read_scenes
from being_vl.files import write_aside, write_json
from being_vl.images.decode import read_image
from being_vl.model.assistant import Assistant
from being_vl.options import Options

MAX_ANSWER_TOKENS = 32
BATCH_SIZE = 128
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
class ExamOptions(Options):
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
class KindScores:
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
class _Conversation:
    """Questions about one picture that are asked one after the other."""

    category: str
    image: str
    questions: tuple[str, ...]
    kinds: tuple[str, ...]
    references: tuple[str, ...]


@dataclass(frozen=True)
class ExamAnswer:
    """One question with the model's answers: `right` with the right picture, `swapped` with another one."""

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
    conversations = list(_read_conversations(options.pictures / "held-out.json", set(names)))
    # The pictures' grids; the control has those of pictures half the list away.
    assistant = Assistant.load(options.model, device="cpu")
    pictures = [read_image(options.pictures / "images" / name) for name in names]
    grids = dict(zip(names, assistant.quantizer.encode(pictures), strict=True))
    shift = len(names) // 2
    swapped_grids = dict(zip(names, [grids[name] for name in names[shift:] + names[:shift]], strict=True))
    # All questions, with the right and with the other grid.
    right_texts, swapped_texts = (
        _ask(assistant, conversations, [image_grids[conversation.image] for conversation in conversations])
        for image_grids in (grids, swapped_grids)
    )
    answers = [
        ExamAnswer(conversation.category, kind, conversation.image, question, reference, right, swapped)
        for conversation, *texts in zip(conversations, right_texts, swapped_texts, strict=True)
        for kind, question, reference, right, swapped in zip(
            conversation.kinds, conversation.questions, conversation.references, *texts, strict=True
        )
    ]
    scores = score(answers, scenes)
    options.out.mkdir(parents=True, exist_ok=True)
    with write_aside(options.out / "answers.jsonl") as path:
        path.write_text("".join(json.dumps(asdict(answer)) + "\n" for answer in answers), encoding="utf-8")
    with write_aside(options.out / "results.md") as path:
        path.write_text(table(scores) + "\n", encoding="utf-8")
    write_json(options.out / "results.json", [asdict(kind_scores) for kind_scores in scores])


def score(answers: Sequence[ExamAnswer], scenes: dict[str, Scene]) -> list[KindScores]:
    """Per category, and per kind of question in it: scores of the right picture and of the controls."""
    # Colours and shapes of a lone object need no binding, and so are a kind of their own.
    answers_of_kind: dict[tuple[str, str], list[ExamAnswer]] = {}
    for answer in answers:
        kind = answer.kind
        if kind in ("colour", "shape"):
            kind += ", one object" if len(scenes[answer.image].things) == 1 else ", several objects"
        answers_of_kind.setdefault((answer.category, kind), []).append(answer)
    scores = [_score_kind(*key, kind_answers, scenes) for key, kind_answers in answers_of_kind.items()]
    # Each category's average before its kinds.
    results = []
    for category in dict.fromkeys(kind_scores.category for kind_scores in scores):
        parts = [kind_scores for kind_scores in scores if kind_scores.category == category]
        parts.sort(key=lambda part: part.kind)
        if len(parts) > 1:
            results.append(_average(category, parts))
        results += parts
    return results


def _score_kind(category: str, kind: str, answers: list[ExamAnswer], scenes: dict[str, Scene]) -> KindScores:
    """The scores of one kind of question."""

    def mean(compare: Callable[[str, str], float], texts: Iterable[str]) -> float:
        pairs = zip(texts, answers, strict=True)
        return float(np.mean([compare(text, answer.reference) for text, answer in pairs]))

    compare = _compare_captions if kind == "caption" else exact_match
    right, swapped = (
        mean(compare, (answer.right for answer in answers)),
        mean(compare, (answer.swapped for answer in answers)),
    )
    if kind == "caption":
        return KindScores(category, kind, len(answers), right, swapped)
    # Chance for one who sees the picture's objects, but not which of them is meant.
    attribute = ATTRIBUTES.get(answers[0].kind)
    chance = 0.5 if answers[0].kind in ONE_OF_TWO else None
    if attribute:
        values = [[getattr(thing, attribute) for thing in scenes[a.image].things] for a in answers]
        shares = [v.count(a.reference) / len(v) for v, a in zip(values, answers, strict=True)]
        chance = float(np.mean(shares))
    majority = majority_share([answer.reference for answer in answers])
    return KindScores(category, kind, len(answers), right, swapped, majority, chance)


def _compare_captions(answer: str, reference: str) -> float:
    return set_f1(find_objects(answer), find_objects(reference))


def _average(category: str, parts: list[KindScores]) -> KindScores:
    """The category as a whole; its majority answers each kind of question with that kind's majority."""
    questions = [part.questions for part in parts]

    def mean(name: str) -> float:
        return float(np.average([getattr(part, name) for part in parts], weights=questions))

    return KindScores(category, "all", sum(questions), mean("right"), mean("swapped"), mean("majority"))


def table(scores: Sequence[KindScores]) -> str:
    """The results as a Markdown table, in per cent."""

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.0f}"

    # Texts of all cells.
    rows = [["category", "question", "number", "right picture", "swapped", "majority", "random object"]]
    for part in scores:
        kind = "caption: F1 of objects" if part.kind == "caption" else part.kind
        shares = (part.right, part.swapped, part.majority, part.random_object)
        rows.append([part.category, kind, str(part.questions), *map(percent, shares)])
    # The first two columns hold words, and stand left; the others numbers.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        " | ".join(
            cell.ljust(width) if n < 2 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    rule = " | ".join("-" * width if n < 2 else "-" * (width - 1) + ":" for n, width in enumerate(widths))
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


def _read_conversations(path: Path, images: set[str]) -> Iterator[_Conversation]:
    """The records about some images: instructions as they are, other questions one at a time.

    So no other question can help to answer one.
    """
    for record in json.loads(path.read_text(encoding="utf-8")):
        category, image = record["category"], record["image"]
        if image not in images:
            continue
        texts = [turn["value"].replace(PLACEHOLDER, "").strip() for turn in record["conversations"]]
        questions, references, kinds = tuple(texts[::2]), tuple(texts[1::2]), tuple(record["kinds"])
        if category == "instruction":
            yield _Conversation(category, image, questions, kinds, references)
        else:
            for question, kind, reference in zip(questions, kinds, references, strict=True):
                yield _Conversation(category, image, (question,), (kind,), (reference,))


def _ask(
    assistant: Assistant, conversations: Sequence[_Conversation], grids: Sequence[NDArray[np.integer[Any]]]
) -> list[list[str]]:
    """Answers to all questions; a later question comes after the model's own earlier answers."""
    answers: list[list[str]] = [[] for _ in conversations]
    for turn in range(max(len(conversation.questions) for conversation in conversations)):
        # The conversations that have a question left, with what was asked and answered before.
        numbers = [n for n, talk in enumerate(conversations) if len(talk.questions) > turn]
        prompts = []
        for n in numbers:
            questions = conversations[n].questions
            history = [
                side
                for question, answer in zip(questions, answers[n], strict=False)
                for side in (Turn("user", question), Turn("assistant", answer))
            ]
            prompts.append([*history, Turn("user", questions[turn])])
        texts = assistant.answer(
            prompts, [[grids[n]] for n in numbers], max_new_tokens=MAX_ANSWER_TOKENS, batch_size=BATCH_SIZE
        )
        for n, text in zip(numbers, texts, strict=True):
            answers[n].append(text)
    return answers
