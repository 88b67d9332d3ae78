"""Make LLaVA JSON out of the stamps of Debian's package tuxpaint-stamps-default.

    apt-get install tuxpaint-stamps-default
    python examples/tuxpaint/prepare.py --out runs/tuxpaint/data

Each stamp is a PNG with a text file beside it, whose first line is an English caption; its folder says what kind of
thing it shows. An image gives a `foundation` record (its caption), a `perception` record (its kind) and an
`instruction` record (both, in two turns). Stamps with the same caption stay together, so that no held-out image has a
twin among the training images.

Writes train.json and held-out.json, and text.json: the training captions alone, with the same questions, for the little
language model that the recipe starts from.
"""

import argparse
import hashlib
import json
from pathlib import Path

CAPTION = "What does the picture show?"
KIND = "What kind of thing is it?"
KINDS = {"naturalforces": "a force of nature", "symbols": "a symbol", "town": "something in town"}


def read_stamps(stamps: Path) -> dict[str, tuple[str, str]]:
    """Path of each captioned PNG below `stamps` → its caption and its kind."""
    labels = {}
    for text in sorted(stamps.rglob("*.txt")):
        image = text.with_suffix(".png")
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        caption = lines[0].strip() if lines else ""
        if image.is_file() and caption:
            key = image.relative_to(stamps)
            labels[key.as_posix()] = caption, KINDS.get(key.parts[0], key.parts[0])
    return labels


def record(
    key: str, category: str, turns: list[tuple[str, str]], has_image: bool = True
) -> dict[str, object]:
    """One record of LLaVA JSON."""
    conversations = []
    for number, (question, answer) in enumerate(turns):
        value = f"<image>\n{question}" if has_image and number == 0 else question
        conversations += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    image = {"image": key} if has_image else {}
    return {"id": f"{key}:{category}", **image, "category": category, "conversations": conversations}


def records(key: str, caption: str, kind: str) -> list[dict[str, object]]:
    """All records of one stamp."""
    return [
        record(key, "foundation", [(CAPTION, caption)]),
        record(key, "perception", [(KIND, kind)]),
        record(key, "instruction", [(KIND, kind), (CAPTION, caption)]),
    ]


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stamps", type=Path, default=Path("/usr/share/tuxpaint/stamps"))
    parser.add_argument("--out", type=Path, default=Path("runs/tuxpaint/data"))
    arguments = parser.parse_args()
    if not arguments.stamps.is_dir():
        parser.error(f"there is no folder {arguments.stamps}: apt-get install tuxpaint-stamps-default")
    train, held_out, text = [], [], []
    for key, (caption, kind) in read_stamps(arguments.stamps).items():
        if int(hashlib.sha256(caption.encode()).hexdigest(), 16) % 10 == 0:
            held_out += records(key, caption, kind)
        else:
            train += records(key, caption, kind)
            text.append(record(key, "foundation", [(CAPTION, caption)], has_image=False))
            text.append(record(key, "reasoning", [(f"{caption} {KIND}", kind)], has_image=False))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, content in {"train": train, "held-out": held_out, "text": text}.items():
        path = arguments.out / f"{name}.json"
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path}: {len(content)} records")


if __name__ == "__main__":
    main()
