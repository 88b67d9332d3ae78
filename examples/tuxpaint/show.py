"""Ask the trained model about the held-out stamps; print scores beside controls, and draw good and bad answers.

    python examples/tuxpaint/show.py

Controls: the same model with the tokens of another held-out picture, and the training set's most frequent answer.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

from prepare import CAPTION, KIND

from being_vl.demo.figures import Asked, draw_answers
from being_vl.images.decode import fit_square, read_image
from being_vl.model.assistant import Assistant

STOP = {"a", "an", "the", "of", "in", "for", "and", "with", "on", "to"}


def words(text: str) -> set[str]:
    """Content words of a caption."""
    return set(re.findall(r"[a-z0-9]+", text.lower())) - STOP


def overlap(said: str, truth: str) -> float:
    """F1 of the content words."""
    a, b = words(said), words(truth)
    return 2 * len(a & b) / (len(a) + len(b)) if a and b else 0.0


def answers(path: Path, question: str) -> dict[str, str]:
    """Image → the answer to a question that stands alone in its record."""
    found = {}
    for record in json.loads(path.read_text(encoding="utf-8")):
        asked, answer = record["conversations"][:2]
        if len(record["conversations"]) == 2 and asked["value"].endswith(question):
            found[record["image"]] = answer["value"]
    return found


def main() -> None:
    """Score, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stamps", type=Path, default=Path("/usr/share/tuxpaint/stamps"))
    parser.add_argument("--run", type=Path, default=Path("runs/tuxpaint"))
    arguments = parser.parse_args()
    data = arguments.run / "data"
    assistant = Assistant.load(arguments.run / "training" / "stage3")
    for question in (KIND, CAPTION):
        truth = answers(data / "held-out.json", question)
        usual = Counter(answers(data / "train.json", question).values()).most_common(1)[0][0]
        keys = list(truth)
        pictures = [read_image(arguments.stamps / key) for key in keys]
        turned = pictures[len(pictures) // 2 :] + pictures[: len(pictures) // 2]
        said = assistant.answer([question] * len(keys), [[p] for p in pictures], max_new_tokens=24)
        swapped = assistant.answer([question] * len(keys), [[p] for p in turned], max_new_tokens=24)
        score = overlap if question == CAPTION else lambda a, b: float(a == b)
        mean = [
            sum(score(a, truth[k]) for k, a in zip(keys, given, strict=True)) / len(keys)
            for given in (said, swapped, [usual] * len(keys))
        ]
        print(f"{question} ({len(keys)} held-out pictures)")
        print(
            "  right picture {:.3f}, another picture {:.3f}, always {!r} {:.3f}".format(
                *mean[:2], usual, mean[2]
            )
        )
        if question == CAPTION:
            rows = [(k, a, truth[k]) for k, a in zip(keys, said, strict=True)]
            rows.sort(key=lambda row: -score(row[1], row[2]))
            for name, chosen in {"good": rows[:8], "bad": rows[-8:]}.items():
                shown = [fit_square(read_image(arguments.stamps / key), 160) for key, _, _ in chosen]
                asked = [[Asked(CAPTION, a, t)] for _, a, t in chosen]
                draw_answers(arguments.run / f"{name}.png", shown, asked)
            for key, a, t in rows:
                print(f"  {score(a, t):.2f}  {key}: said {a!r}, is {t!r}")


if __name__ == "__main__":
    main()
