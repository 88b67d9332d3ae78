"""Which image a name in a record means: keys, paths, links, Unicode, several folders, data that have moved."""

import io
import json
import shutil
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from being_vl.errors import ManifestError, QuantizerError, RecordError
from being_vl.files import MANIFEST
from being_vl.images.lookup import ImageLookup, ListedImages
from being_vl.images.sources import find_images
from being_vl.quantizer.job import quantize
from being_vl.quantizer.models.tiled import VQGAN
from being_vl.quantizer.options import QuantizeOptions
from being_vl.shards.grids import Grids
from helpers import tiny

Quantize = Callable[..., Path]


def png(seed: int) -> bytes:
    """An image whose size in bytes is that of every other one."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()


def write(path: Path, content: int | dict[str, int] | bytes) -> Path:
    """An image, a file of bytes, or a tar or table of images, whose names a table leaves out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, int):
        path.write_bytes(png(content))
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".tar":
        with tarfile.open(path, "w") as tar:
            for name, seed in content.items():
                member = tarfile.TarInfo(name)
                member.size = len(png(seed))
                tar.addfile(member, io.BytesIO(png(seed)))
    else:
        table = pa.table({"image": pa.array([png(seed) for seed in content.values()], pa.binary())})
        if path.suffix == ".parquet":
            pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
        else:
            feather.write_feather(table, path, compression="uncompressed")
    return path


@pytest.fixture(scope="module")
def quantizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VQGAN]:
    folder = tmp_path_factory.mktemp("quantizer")
    return folder, tiny.quantizer(folder, codebook_size=64)


@pytest.fixture
def quantized(quantizer: tuple[Path, VQGAN], tmp_path: Path) -> Quantize:
    """Quantizes what is named; returns the folder of grids."""

    def run(images: Path, name: str = "grids", **options: Any) -> Path:
        out = tmp_path / "out" / name
        quantize(QuantizeOptions(images, out, str(quantizer[0]), max_failed=0.9, workers=0, **options))
        return out

    return run


@pytest.fixture
def seed(quantizer: tuple[Path, VQGAN]) -> Callable[..., int]:
    """Tells which image a grid was made of."""
    images = [Image.open(io.BytesIO(png(seed))) for seed in range(10)]
    expected = [grid.tolist() for grid in quantizer[1].encode(images)]
    return lambda grids, *name: expected.index(grids[grids.find(*map(str, name))].tolist())


def refuse(grids: Grids | ImageLookup, name: object, folder: Path | None = None) -> str:
    """The message that a name is refused with; it is never long."""
    with pytest.raises(RecordError) as error:
        grids.find(str(name), folder)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    assert error.value.kind == ("ambiguous image" if "could be" in message else "missing image")
    return message


Seed = Callable[..., int]


@pytest.mark.parametrize("suffix", ["tar", "parquet", "arrow"])
def test_the_same_names_in_two_files(tmp_path: Path, quantized: Quantize, seed: Seed, suffix: str) -> None:
    member = "000.png" if suffix == "tar" else "0"
    names = {"000.png": 0, "x/001.png": 1} if suffix == "tar" else {"": 0, " ": 1}
    cc3m = write(tmp_path / "data" / "cc3m" / f"00000.{suffix}", names)
    sbu = write(tmp_path / "data" / "sbu" / f"00000.{suffix}", {name: n + 2 for name, n in names.items()})
    assert cc3m.stat().st_size == sbu.stat().st_size

    # One of them quantized, as a folder or as a file: the other's images are missing.
    for images in (cc3m.parent, cc3m):
        grids = Grids.open(quantized(images, images.stem))
        assert seed(grids, cc3m / member) == seed(grids, f"00000.{suffix}/{member}") == 0
        assert "holds another image" in refuse(grids, sbu / member)

    # Both quantized, apart and together.
    both = [quantized(cc3m.parent, "cc3m"), quantized(sbu.parent, "sbu")]
    together = quantized(tmp_path / "data", "together")
    for folders in (both, both[::-1], [together], [together, *both]):
        grids = Grids.open(folders)
        assert [seed(grids, path / member) for path in (cc3m, sbu)] == [0, 2]
    grids = Grids.open(both)
    message = refuse(grids, f"00000.{suffix}/{member}")
    assert str(cc3m / member) in message
    assert str(sbu / member) in message
    # Keys are unique, and the same in any order of the folders.
    assert len(grids) == 4
    assert set(grids) == set(Grids.open(both[::-1])) == {grids.find(str(path)) for path in map(Path, grids)}
    assert sum(len(heights) for _, heights, _ in grids.blocks()) == 4
    with pytest.raises(KeyError):
        grids[f"00000.{suffix}/{member}"]
    assert f"00000.{suffix}/{member}" not in grids


@pytest.mark.parametrize("suffix", ["tar", "parquet", "arrow"])
def test_moved_data_are_paired_by_their_bytes(
    tmp_path: Path, quantized: Quantize, seed: Seed, suffix: str
) -> None:
    member = "000.png" if suffix == "tar" else "0"
    other_member = "x/001.png" if suffix == "tar" else "1"
    old = write(tmp_path / "old" / "a" / f"1.{suffix}", {"000.png": 0, "x/001.png": 1})
    grids = Grids.open(quantized(old.parent))
    new = tmp_path / "new" / "b" / old.name
    shutil.copytree(old.parent, new.parent)
    shutil.rmtree(old.parent)
    assert seed(grids, new / member) == 0
    assert seed(grids, new / other_member) == 1
    # Other content, another name of the file, no such member, no file at all.
    write(tmp_path / "newer" / old.name, {"000.png": 1, "x/001.png": 0})
    for other_new in (tmp_path / "newer" / old.name / member, tmp_path / "newer" / old.name / other_member):
        assert "holds another image" in refuse(grids, other_new)
    shutil.copy(new, new.with_name(f"2.{suffix}"))
    refuse(grids, new.with_name(f"2.{suffix}") / member)
    refuse(grids, new / "9")
    assert "cannot be read" in refuse(grids, tmp_path / "gone" / old.name / member)
    new.write_bytes(b"damaged")
    assert "cannot be read" in refuse(grids, new / member)


def test_moved_image_files(tmp_path: Path, quantized: Quantize, seed: Seed) -> None:
    for n, name in enumerate(["coco/a.png", "gqa/a.png"]):
        write(tmp_path / "old" / name, n)
    grids = Grids.open([quantized(tmp_path / "old" / "coco", "coco"), quantized(tmp_path / "old", "all")])
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert seed(grids, tmp_path / "new" / "gqa" / "a.png") == 1
    assert seed(grids, tmp_path / "new" / "coco" / "a.png") == 0
    write(tmp_path / "new" / "gqa" / "a.png", 0)
    assert "holds another image" in refuse(Grids(grids.stores[1:]), tmp_path / "new" / "gqa" / "a.png")


def test_a_file_beside_the_records_of_the_same_name(tmp_path: Path, quantized: Quantize, seed: Seed) -> None:
    coco, llava = tmp_path / "coco", tmp_path / "llava"
    for n in range(3):
        write(coco / "train" / f"{n}.png", n)
    write(coco / "1.tar" / "no.txt", b"")
    grids = Grids.open(quantized(coco))
    llava.mkdir()
    assert seed(grids, "train/0.png", llava) == 0  # nothing is called `train` there
    write(llava / "train" / "0.png", 5)
    write(llava / "train" / "1.png", 1)
    (llava / "train" / "2.png").symlink_to(coco / "train" / "2.png")
    message = refuse(Grids.open(grids.stores[0].folder), "train/0.png", llava)
    assert str(llava / "train" / "0.png") in message
    assert str(coco / "train" / "0.png") in message
    grids = Grids.open(grids.stores[0].folder)
    assert [seed(grids, f"train/{n}.png", llava) for n in (1, 2)] == [1, 2]  # a copy, a link
    assert seed(grids, "./train//0.png", coco) == seed(grids, "train/0.png", coco) == 0
    assert seed(grids, "train/0.png", tmp_path / "gone") == 0
    # A file that cannot be read may be another image.
    (llava / "train" / "1.png").unlink()
    (llava / "train" / "1.png").symlink_to(llava / "train")
    assert seed(grids, "train/1.png", llava) == 1
    # Beside the records lies a tar of that name.
    tar = write(tmp_path / "tars" / "1.tar", {"a.png": 3})
    write(tmp_path / "others" / "1.tar", {"a.png": 4})
    grids = Grids.open(quantized(tar, "tar"))
    assert seed(grids, "1.tar/a.png", tar.parent) == 3
    assert "others/1.tar/a.png" in refuse(grids, "1.tar/a.png", tmp_path / "others")


def test_names_relative_to_the_records(tmp_path: Path, quantized: Quantize, seed: Seed) -> None:
    write(tmp_path / "data" / "llava" / "images" / "a.png", 0)
    write(tmp_path / "data" / "b.png", 1)
    write(tmp_path / "outside.png", 2)
    grids = Grids.open(quantized(tmp_path / "data"))
    llava = tmp_path / "data" / "llava"
    assert seed(grids, "images/a.png", llava) == seed(grids, "llava/images/a.png", llava) == 0
    assert seed(grids, "../b.png", llava) == seed(grids, llava / ".." / "b.png") == 1
    assert "did you mean 'llava/images/a.png'?" in refuse(grids, "images/a.png", tmp_path)
    refuse(grids, "../outside.png", tmp_path / "data")
    # Two images, each of which it could be.
    write(llava / "b.png", 3)
    grids = Grids.open(quantized(tmp_path / "data", "again"))
    message = refuse(grids, "b.png", llava)
    assert str(llava / "b.png") in message
    assert str(tmp_path / "data" / "b.png") in message


def test_files_outside_of_the_root(tmp_path: Path, quantized: Quantize, seed: Seed) -> None:
    write(tmp_path / "here" / "a.png", 0)
    write(tmp_path / "there" / "b.png", 1)
    paths = write(tmp_path / "here" / "list.txt", f"a.png\n{tmp_path}/there/b.png".encode())
    assert "left out: outside the root" in refuse(Grids.open(quantized(paths)), tmp_path / "there" / "b.png")
    grids = Grids.open(quantized(paths, "outside", allow_outside=True))
    assert seed(grids, "a.png") == seed(grids, tmp_path / "here" / "a.png") == 0
    assert seed(grids, tmp_path / "there" / "b.png") == seed(grids, "../there/b.png", tmp_path / "here") == 1
    refuse(grids, "b.png")


def test_links_to_folders(tmp_path: Path, quantized: Quantize, seed: Seed) -> None:
    real = tmp_path / "store" / "real"
    write(real / "coco" / "a.png", 0)
    write(real / "coco" / "1.tar", {"b.png": 1})
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "one.png").symlink_to(real / "coco" / "a.png")
    for images in (real, tmp_path / "link"):
        grids = Grids.open(quantized(images, images.name))
        for folder in (real, tmp_path / "link"):
            assert seed(grids, folder / "coco" / "a.png") == 0
        assert seed(grids, tmp_path / "one.png") == 0
    grids = Grids.open(quantized(tmp_path / "link" / "coco" / "1.tar", "tar"))
    assert seed(grids, real / "coco" / "1.tar" / "b.png") == 1
    (tmp_path / "loop").symlink_to("loop")
    refuse(grids, tmp_path / "loop" / "a.png")


@pytest.mark.parametrize("stored_form", ["NFC", "NFD"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_two_ways_to_write_the_same_letters(
    tmp_path: Path, quantized: Quantize, seed: Seed, stored_form: str, form: str
) -> None:
    names = ["Ärger.png", "é/ü.png", "plain.png", "각.png"]
    root = tmp_path / unicodedata.normalize(stored_form, "dätä")
    for n, name in enumerate(names):
        write(root / unicodedata.normalize(stored_form, name), n)
    grids = Grids.open(quantized(root))
    for n, name in enumerate(names):
        spelling = unicodedata.normalize(form, name)
        assert seed(grids, spelling) == seed(grids, spelling, root) == n
        assert seed(grids, tmp_path / unicodedata.normalize(form, "dätä") / spelling) == n
    refuse(grids, unicodedata.normalize(form, "ä.png"))


def test_both_ways_to_write_the_same_letters(tmp_path: Path, quantized: Quantize, seed: Seed) -> None:
    composed, decomposed = "\u1e69.png", "s\u0323\u0307.png"
    partly = "\u1e61\u0323.png"
    write(tmp_path / "data" / composed, 0)
    write(tmp_path / "data" / decomposed, 1)
    grids = Grids.open(quantized(tmp_path / "data"))
    assert [seed(grids, name) for name in (composed, decomposed)] == [0, 1]
    message = refuse(grids, partly)
    assert r"\u1e69.png" in message
    assert r"s\u0323\u0307.png" in message
    write(tmp_path / "data" / decomposed, 0)
    grids = Grids.open(quantized(tmp_path / "data", "same"))
    assert seed(grids, partly) == 0


def test_what_was_left_out_is_named_with_its_reason(tmp_path: Path, quantized: Quantize) -> None:
    write(tmp_path / "data" / "a.png", 0)
    write(tmp_path / "data" / ".hidden" / "b.png", 1)
    write(tmp_path / "data" / "empty.png", b"")
    write(tmp_path / "data" / "1.tar", {"c.png": 2, "._c.png": 3})
    (tmp_path / "data" / "gone.png").symlink_to("nowhere")
    grids = Grids.open(quantized(tmp_path / "data"))
    lookup = ImageLookup([ListedImages(find_images(tmp_path / "data"))])
    for name in (".hidden/b.png", "empty.png", "gone.png", "1.tar/._c.png"):
        for spelling in (name, tmp_path / "data" / name):
            assert "(left out: " in refuse(grids, spelling)
            assert "(left out: " in refuse(lookup, spelling)
    assert "left out" not in refuse(grids, "d.png")


def test_images_that_could_not_be_read(tmp_path: Path, quantized: Quantize, seed: Seed) -> None:
    write(tmp_path / "a" / "x.png", b"no image")
    write(tmp_path / "a" / "ä.png", b"no image")
    write(tmp_path / "a" / "y.png", 0)
    write(tmp_path / "b" / "x.png", 1)
    a, b = quantized(tmp_path / "a", "a"), quantized(tmp_path / "b", "b")
    grids = Grids.open(a)
    for name in ("x.png", tmp_path / "a" / "x.png", "a\u0308.png"):
        assert "cannot identify" in refuse(grids, name)
    # One could not be read, the other could: the name does not say which is meant.
    grids = Grids.open([a, b])
    assert "could be" in refuse(grids, "x.png")
    assert seed(grids, tmp_path / "b" / "x.png") == 1
    assert "cannot identify" in refuse(grids, tmp_path / "a" / "x.png")
    # Mended and quantized again, beside the earlier grids.
    write(tmp_path / "a" / "x.png", 2)
    grids = Grids.open([a, quantized(tmp_path / "a", "mended")])
    assert seed(grids, "x.png") == seed(grids, tmp_path / "a" / "x.png") == 2


def test_the_same_images_quantized_twice(tmp_path: Path, quantized: Quantize, seed: Seed) -> None:
    write(tmp_path / "a" / "x.png", 0)
    write(tmp_path / "b" / "x.png", 0)
    write(tmp_path / "b" / "y.png", 1)
    folders = [quantized(tmp_path / "a", "a"), quantized(tmp_path / "b", "b"), quantized(tmp_path / "b", "c")]
    for order in (folders, folders[::-1], [*folders, *folders]):
        grids = Grids.open(order)
        assert seed(grids, "x.png") == 0  # the same bytes, whichever is meant
        assert grids.find("x.png") == str(tmp_path / "a" / "x.png")
        assert seed(grids, "y.png") == 1
        assert sorted(grids) == sorted(map(str, (tmp_path / "a" / "x.png", *(tmp_path / "b").iterdir())))
    # Changed in between: the same path means two images.
    write(tmp_path / "b" / "y.png", 2)
    grids = Grids.open([folders[1], quantized(tmp_path / "b", "d")])
    message = refuse(grids, "y.png")
    assert f"y.png as in {folders[1]}"[-70:] in message
    assert f"as in {tmp_path}/out/d," in message


def test_names_that_are_no_paths(tmp_path: Path, quantized: Quantize) -> None:
    write(tmp_path / "data" / "a.png", 0)
    grids = Grids.open(quantized(tmp_path / "data"))
    names = [
        "",
        ".",
        "..",
        "/",
        "a\0.png",
        "a.png\0",
        "x" * 100_000,
        "/" + "y/" * 50_000,
        "\n\n",
        "\ud800.png",
        "~",
        "a.png/b",
    ]
    for name in names:
        for spelling in (name, f"/{name}"):
            refuse(grids, spelling, tmp_path / "data")
            refuse(grids, spelling, tmp_path)
            refuse(grids, spelling)


def test_folders_of_grids_that_do_not_fit(tmp_path: Path, quantized: Quantize) -> None:
    write(tmp_path / "a" / "x.png", 0)
    first = quantized(tmp_path / "a")
    other = tiny.grids(tmp_path / "other", ["y.png"], tiny.quantizer(tmp_path / "q", seed=3)).folder
    with pytest.raises(QuantizerError, match=rf"{other}: is of quantizer .*, but {first} is of"):
        Grids.open([first, other])
    manifest = json.loads((first / MANIFEST).read_text())
    del manifest["root"]
    (first / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match="'root'"):
        Grids.open(first)


def test_before_anything_is_quantized(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write(root / "a" / "x.png", 0)
    write(root / "ü.png", 1)
    lookup = ImageLookup([ListedImages(find_images(root))])
    assert lookup.find("a/x.png").key == lookup.find(str(root / "a" / "x.png")).key == "a/x.png"
    assert lookup.find("x.png", root / "a").key == "a/x.png"
    assert lookup.find("u\u0308.png").key == "ü.png"
    write(tmp_path / "records" / "a" / "x.png", 2)
    assert str(tmp_path / "records" / "a" / "x.png") in refuse(lookup, "a/x.png", tmp_path / "records")
    assert refuse(lookup, "z.png") == f"the image 'z.png' is not among those of {root}"
