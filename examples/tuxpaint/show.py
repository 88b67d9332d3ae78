"""Ask the trained model about the held-out stamps; print scores beside controls, and draw good and bad answers.

    python examples/tuxpaint/show.py

Controls: the same model with the tokens of another held-out image, and the training set's most frequent answer.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

from prepare import CAPTION, KIND

from being_vl.demo.figures import FigureQuestion, draw_answers
from being_vl.images.decode import fit_square, read_image
from being_vl.model.assistant import Assistant

STOP = {"a", "an", "the", "of", "in", "for", "and", "with", "on", "to"}


def words(text: str) -> set[str]:
    """Content words of a caption."""
    return set(re.findall(r"[a-z0-9]+", text.lower())) - STOP


def overlap(answer: str, reference: str) -> float:
    """F1 of the content words."""
    a, b = words(answer), words(reference)
    return 2 * len(a & b) / (len(a) + len(b)) if a and b else 0.0


def equality(answer: str, reference: str) -> float:
    """1 for the same text, else 0."""
    return float(answer == reference)


def read_answers(path: Path, question: str) -> dict[str, str]:
    """Image → the answer to a question that stands alone in its record."""
    answers = {}
    for record in json.loads(path.read_text(encoding="utf-8")):
        question_turn, answer_turn = record["conversations"][:2]
        if len(record["conversations"]) == 2 and question_turn["value"].endswith(question):
            answers[record["image"]] = answer_turn["value"]
    return answers


def main() -> None:
    """Score, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stamps", type=Path, default=Path("/usr/share/tuxpaint/stamps"))
    parser.add_argument("--run", type=Path, default=Path("runs/tuxpaint"))
    arguments = parser.parse_args()
    assistant = Assistant.load(arguments.run / "training" / "stage3")
    for question, score in ((KIND, equality), (CAPTION, overlap)):
        references = read_answers(arguments.run / "data" / "held-out.json", question)
        training_answers = read_answers(arguments.run / "data" / "train.json", question)
        majority_answer = Counter(training_answers.values()).most_common(1)[0][0]
        # With the right image and, as a control, with one half the list away.
        images = [read_image(arguments.stamps / key) for key in references]
        half = len(images) // 2
        answers, swapped_answers = (
            assistant.answer([question] * len(images), [[image] for image in order], max_new_tokens=24)
            for order in (images, images[half:] + images[:half])
        )
        means = [
            sum(map(score, texts, references.values())) / len(references)
            for texts in (answers, swapped_answers, [majority_answer] * len(references))
        ]
        print(f"{question} ({len(references)} held-out images)")
        print(
            f"  right image {means[0]:.3f}, another image {means[1]:.3f}, always {majority_answer!r} {means[2]:.3f}"
        )
        if question == CAPTION:
            show_captions(
                arguments.stamps, arguments.run, dict(zip(references, answers, strict=True)), references
            )


def show_captions(stamps: Path, out: Path, answers: dict[str, str], references: dict[str, str]) -> None:
    """Print all answers, the best first, and draw the best and the worst eight."""
    keys = sorted(answers, key=lambda key: -overlap(answers[key], references[key]))
    for name, selection in {"good": keys[:8], "bad": keys[-8:]}.items():
        images = [fit_square(read_image(stamps / key), 160) for key in selection]
        questions = [[FigureQuestion(CAPTION, answers[key], references[key])] for key in selection]
        draw_answers(out / f"{name}.png", images, questions)
    for key in keys:
        answer, reference = answers[key], references[key]
        print(f"  {overlap(answer, reference):.2f}  {key}: answer {answer!r}, caption {reference!r}")


if __name__ == "__main__":
    main()
