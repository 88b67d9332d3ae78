"""Gather the photographs of `photographs.tsv` from unpacked packages: README.md says how to get those.

    python examples/builtin_quantizer/gather.py PACKAGES OUT

Writes OUT/training and OUT/held-out, as PNG, the shorter side at most 512 pixels.
"""

import csv
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from being_vl.images.decode import read_image

LIST = Path(__file__).parent / "photographs.tsv"
SHORTER_SIDE = 512
FOLDERS = {
    "gcompris-qt-data": "gcompris/src/activities",
    "lxqt-themes": "usr/share/lxqt/wallpapers",
    "opencv-doc": "usr/share/doc/opencv-doc/examples/data",
    "plasma-workspace-wallpapers": "usr/share/wallpapers",
    "scikit-image": "skimage/data",
}


def gather(packages: Path, out: Path) -> None:
    """Write `out/training` and `out/held-out`."""
    unpack_resources(packages / "gcompris-qt-data")
    with LIST.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    for number, row in enumerate(rows):
        folder = packages / row["package"] / FOLDERS.get(row["package"], "usr/share/backgrounds")
        image = read_image(folder / row["file"])
        scale = min(1.0, SHORTER_SIDE / min(image.size))
        size = round(image.width * scale), round(image.height * scale)
        target = out / row["part"] / f"{number:03d}-{Path(row['file']).stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        image.resize(size, Image.Resampling.BICUBIC).save(target)


def unpack_resources(folder: Path) -> None:
    """Write the files that are inside of Qt's resource files (`.rcc`) beside them, under `folder`."""
    for path in sorted(folder.rglob("*.rcc")):
        for name, content in resources(path.read_bytes()):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def resources(rcc: bytes) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of the files in a Qt resource file, versions 1 and 2."""
    version, tree, contents, names = struct.unpack_from(">4I", rcc, 4)
    node_size = 14 if version == 1 else 22

    def walk(node: int, parent: str) -> Iterator[tuple[str, bytes]]:
        name_at, flags = struct.unpack_from(">IH", rcc, tree + node * node_size)
        start = names + name_at
        (length,) = struct.unpack_from(">H", rcc, start)
        name = rcc[start + 6 : start + 6 + 2 * length].decode("utf-16-be")
        path = f"{parent}/{name}" if node else ""
        if flags & 2:
            count, first = struct.unpack_from(">II", rcc, tree + node * node_size + 6)
            for child in range(first, first + count):
                yield from walk(child, path)
        else:
            (content_at,) = struct.unpack_from(">I", rcc, tree + node * node_size + 10)
            start = contents + content_at
            (size,) = struct.unpack_from(">I", rcc, start)
            content = rcc[start + 4 : start + 4 + size]
            yield path.lstrip("/"), zlib.decompress(content[4:]) if flags & 1 else content

    yield from walk(0, "")


if __name__ == "__main__":
    gather(Path(sys.argv[1]), Path(sys.argv[2]))
