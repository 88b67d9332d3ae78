"""Finding images: everything that is there is found or left out with the reason, whatever lies beside it."""

import gzip
import io
import json
import os
import shutil
import socket
import tarfile
from base64 import b64encode
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from being_vl.errors import ImageError
from being_vl.images import files as image_files
from being_vl.images.encoded import NoImageError
from being_vl.images.sources import Findings, find_images

OUTSIDE = "outside the root (taken with allow_outside)"


def image(kind: str = "PNG", level: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(file, kind)
    return file.getvalue()


PNG = image()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def make_tar(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def make_parquet(columns: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def make_arrow(columns: dict[str, Any]) -> bytes:
    table, file = pa.table(columns), io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def keys(findings: Findings) -> list[str]:
    return [source.key for source in findings.sources]


def reasons(findings: Findings) -> dict[str, str]:
    return {item.name: item.reason for item in findings.left_out}


def test_a_folder_of_everything_is_accounted_for(tmp_path: Path) -> None:
    images = {f"x/{n}": PNG for n in ("a.png", "b.JPG", "c.jfif", "d.jpe", "no-suffix", "f.PNG", "g.bin")}
    write(tmp_path, images | {"x/h.webp": image("WEBP"), "tga.tga": image("TGA"), "wrong.txt": image("GIF")})
    write(tmp_path, {"0.tar": make_tar({"1.png": PNG, "1.txt": b"A.", "._1.png": b"Mac"})})
    write(tmp_path, {"without-suffix": make_tar({"2.png": PNG})})
    write(tmp_path, {"t.parquet": make_parquet({"jpg": [PNG, PNG]}), "u.arrow": make_arrow({"png": [PNG]})})
    write(
        tmp_path,
        {"1.txt": b"A.", "1.json": b"{}", "2.txt": b"B.", "Thumbs.db": b"\xd0\xcf", ".DS_Store": b"1"},
    )
    write(
        tmp_path,
        {".git/objects/ab/cd": b"1", ".git/HEAD": b"1", "._a.png": b"1", "empty.png": b"", "empty.tar": b""},
    )
    write(
        tmp_path,
        {
            "3.tar.gz": gzip.compress(make_tar({"3.png": PNG})),
            "4.tar": gzip.compress(b"tar"),
            "5.zip": b"PK\3\4",
        },
    )
    write(tmp_path, {"s.svg": b"<svg xmlns=''/>", "p.pdf": b"%PDF-1.4", "e.jpg.eps": b"%!PS-Adobe"})
    write(tmp_path, {"big.tar": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"})
    write(
        tmp_path,
        {
            "urls.parquet": make_parquet({"url": ["http://x"]}),
            "n.parquet": make_parquet({"image": ["a.png"]}),
        },
    )
    findings = find_images(tmp_path)
    members = ["0.tar/1.png", "without-suffix/2.png", "t.parquet/0", "t.parquet/1", "u.arrow/0"]
    assert keys(findings) == sorted([*images, "x/h.webp", "tga.tga", "wrong.txt", *members])
    assert reasons(findings) == {
        "0.tar/._1.png": "hidden",
        ".git/": "hidden",
        ".DS_Store": "hidden",
        "._a.png": "hidden",
        "empty.png": "empty",
        "empty.tar": "empty",
        "3.tar.gz": "compressed (decompress it)",
        "4.tar": "compressed (decompress it)",
        "5.zip": "compressed (decompress it)",
        "s.svg": "SVG, a format that is not read",
        "p.pdf": "PDF, a format that is not read",
        "e.jpg.eps": "PostScript, a format that is not read",
        "big.tar": "a Git LFS pointer (run git lfs pull)",
        "urls.parquet": "a table without images",
        "n.parquet": "a table that names images (give it by itself)",
    }
    account = findings.account()
    assert account.left_out["hidden"] == 5
    assert account.left_out["not an image (.txt)"] == 3
    assert account.left_out["not an image (.json)"] == account.left_out["not an image (.db)"] == 1
    # Nothing is counted twice or passed over: each file is one, but the containers, whose members are.
    num_files = sum(len(names) for _, _, names in os.walk(tmp_path))
    assert account.seen == num_files - 4 + len([*members, "0.tar/1.txt", "0.tar/._1.png"])


def test_an_account_names_few_suffixes(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": PNG} | {f"{n}.{'x' * n}": b"1" for n in range(1, 40)} | {"b.x": b"1"})
    counts = find_images(tmp_path).account().left_out
    assert counts["not an image (.x)"] == 2
    assert counts["not an image (other suffixes)"] == 33
    assert len(counts) <= 7
    assert max(map(len, counts)) < 40


def test_linked_folders_are_followed_and_cycles_noticed(tmp_path: Path) -> None:
    write(tmp_path, {"coco/train/1.png": PNG, "data/2.png": PNG, "other/3.png": PNG})
    data = tmp_path / "data"
    (data / "coco").symlink_to("../coco")
    (data / "again").symlink_to(tmp_path / "coco")
    (data / "file.png").symlink_to(tmp_path / "other/3.png")
    (tmp_path / "coco/up").symlink_to(data)
    (data / "self").symlink_to(".")
    (data / "loop.png").symlink_to("loop.png")
    (data / ".hidden").symlink_to("../other")
    findings = find_images(data)
    assert keys(findings) == ["2.png", "again/train/1.png", "coco/train/1.png", "file.png"]
    cycle = "a link to a folder that it lies in"
    expected = {"self/": cycle, "coco/up/": cycle, "again/up/": cycle, ".hidden": "hidden"}
    assert reasons(findings) == expected | {"loop.png": "cannot be read"}


def test_what_is_no_regular_file_is_never_opened(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": PNG})
    os.mkfifo(tmp_path / "fifo.png")
    os.mkfifo(tmp_path / "fifo.tar")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "tty").symlink_to("/dev/tty")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(tmp_path, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{folder}/socket.png")
        os.close(folder)
        findings = find_images(tmp_path)
    assert keys(findings) == ["a.png"]
    assert Counter(reasons(findings).values()) == {"not a regular file": 5, "a link to nothing": 1}
    (tmp_path / "list.txt").write_text("a.png\nfifo.png\nzero.png\nsocket.png\n")
    assert keys(find_images(tmp_path / "list.txt", allow_outside=True)) == ["a.png"]
    for name in ("fifo.tar", "zero.png"):
        with pytest.raises(ImageError):
            find_images(tmp_path / name)


def test_files_that_are_too_large_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(40 << 30)
    monkeypatch.setattr(image_files, "MAX_FILE", 1000)
    big = PNG + bytes(2000)
    write(tmp_path, {"t.tar": make_tar({"1.png": big}), "p.parquet": make_parquet({"png": [big]})})
    sources = find_images(tmp_path).sources
    assert len(sources) == 3
    for source in sources:
        with pytest.raises(OSError, match="bytes; expected at most 1,000"):
            source.read()


def test_names_that_cannot_be_stored_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, {"é.png": PNG, "new\nline.png": PNG, "\x1b[31m.png": PNG})
    (tmp_path / os.fsdecode(b"latin-\xe9.png")).write_bytes(PNG)
    findings = find_images(tmp_path)
    assert keys(findings) == ["\x1b[31m.png", "new\nline.png", "é.png"]
    assert list(reasons(findings).values()) == ["a name that is not UTF-8"]


def test_what_other_tools_leave_beside_images_stops_nothing(tmp_path: Path) -> None:
    """img2dataset's tables and statistics beside its tars, `datasets`' caches beside its files."""
    stats = {"00000_stats.json": b"{}", "00000.parquet": make_parquet({"url": ["u"], "caption": ["A."]})}
    write(
        tmp_path / "web",
        {"00000.tar": make_tar({"1.jpg": PNG}), "00001.tar": make_tar({"2.jpg": PNG})} | stats,
    )
    (tmp_path / "web/00001.parquet").write_bytes(stats["00000.parquet"][:100])
    findings = find_images(tmp_path / "web")
    assert keys(findings) == ["00000.tar/1.jpg", "00001.tar/2.jpg"]
    expected = {"00000.parquet": "a table without images", "00001.parquet": "a damaged table beside a tar"}
    assert reasons(findings) == expected
    for marker in ("state.json", "dataset_info.json"):
        data, cache = make_arrow({"image": [PNG]}), make_arrow({"image": [PNG, PNG]})
        files = {"data-00000-of-00001.arrow": data, "cache-0123abcd.arrow": cache, marker: b"{}"}
        findings = find_images(write(tmp_path / marker, files))
        assert keys(findings) == ["data-00000-of-00001.arrow/0"]
        assert reasons(findings) == {"cache-0123abcd.arrow": "a cache of datasets"}
    # Elsewhere a file of that name is a table as any other.
    assert len(find_images(write(tmp_path / "own", {"cache-1.arrow": data})).sources) == 1


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.arrow"])
def test_a_container_that_is_damaged_is_one_error_beside_images_too(tmp_path: Path, name: str) -> None:
    write(tmp_path, {"b.png": PNG, name: b"<html>502 Bad Gateway</html>" * 100})
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ImageError, match=rf"/{name}: not a complete"):
            find_images(path)


def test_keys_are_below_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = make_tar({"000.png": PNG})
    write(tmp_path, {"cc3m/00000.tar": tar, "sbu/00000.tar": tar, "x/1.png": PNG})
    assert keys(find_images(tmp_path)) == ["cc3m/00000.tar/000.png", "sbu/00000.tar/000.png", "x/1.png"]
    for path in (tmp_path / "sbu", tmp_path / "sbu/00000.tar"):
        assert keys(find_images(path)) == ["00000.tar/000.png"]
        assert keys(find_images(path, tmp_path)) == ["sbu/00000.tar/000.png"]
        assert keys(find_images(path, tmp_path / "x")) == [f"{tmp_path}/sbu/00000.tar/000.png"]
    monkeypatch.chdir(tmp_path / "x")
    (tmp_path / "link").symlink_to("sbu")
    for name, root in (
        ("../sbu", "sbu"),
        ("../link", "link"),
        (".", "x"),
        ("../cc3m/../sbu/00000.tar", "sbu"),
    ):
        assert find_images(name).root == tmp_path / root


def test_lines_of_a_list_are_files_or_have_a_reason(tmp_path: Path) -> None:
    write(tmp_path, {f"{n}.png": PNG for n in "abcde"} | {"f/1.png": PNG, "empty.png": b"", '"q".png': PNG})
    write(tmp_path, {"t.tar": make_tar({"1.png": PNG}), "t.parquet": make_parquet({"png": [PNG]})})
    lines = [
        "a.png",
        "",
        "./b.png  ",
        "x/../c.png",
        "a.png",
        f"{tmp_path}/d.png",
        f"file://{tmp_path}/e.png",
        '"q".png',
    ]
    odd = [
        "f",
        "http://x/y.png",
        '"a.png"',
        "'b.png'",
        "empty.png",
        "x" * 5000 + ".png",
        "t.tar",
        "t.parquet",
        "gone.png",
    ]
    expected = ['"q".png', *(f"{n}.png" for n in "abcde"), "gone.png", "t.parquet/0", "t.tar/1.png"]
    for encoding, end in (("utf-8", "\n"), ("utf-8-sig", "\r\n"), ("utf-16", "\r\n")):
        (tmp_path / "list.TXT").write_bytes(end.join(lines + odd).encode(encoding))
        findings = find_images(tmp_path / "list.TXT")
        assert keys(findings) == sorted(expected)
        assert {name[:20]: reason for name, reason in reasons(findings).items()} == {
            "f": "a folder (list its files)",
            "http://x/y.png": "a URL (download it)",
            '"a.png"': "in quotes (write the bare name)",
            "'b.png'": "in quotes (write the bare name)",
            "empty.png": "empty",
            "x" * 20: "a name too long",
        }
    (tmp_path / "list.TXT").write_bytes(b"a.png\nb\xe9.png")
    assert list(reasons(find_images(tmp_path / "list.TXT")).values()) == ["a name that is not UTF-8"]
    with pytest.raises(OSError, match="No such file"):
        next(source for source in findings.sources if source.key == "gone.png").read()


def test_files_outside_the_root_are_read_only_when_asked_for(tmp_path: Path) -> None:
    root = write(tmp_path / "root", {"1.png": PNG, "in/2.png": PNG})
    write(tmp_path, {"out/3.png": PNG, "4.png": PNG, "root2/5.png": PNG})
    (root / "link.png").symlink_to("../4.png")
    (root / "folder").symlink_to("../out")
    (root / "inner").symlink_to("in")
    names = [
        "1.png",
        "inner/2.png",
        "in/../1.png",
        "../4.png",
        f"{tmp_path}/out/3.png",
        "link.png",
        "folder/3.png",
        "../root2/5.png",
    ]
    (root / "list.txt").write_text("\n".join(names))
    (root / "r.json").write_text(json.dumps([{"image": name} for name in names]))
    rows = [{"bytes": None, "path": name} for name in names]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    (root / "t.parquet").write_bytes(make_parquet({"image": pa.array(rows, kind)}))
    inside, outside = ["1.png", "inner/2.png"], names[3:]
    for name in ("list.txt", "r.json"):
        findings = find_images(root / name)
        assert keys(findings) == inside
        assert reasons(findings) == dict.fromkeys(outside, OUTSIDE)
        found = [
            f"{tmp_path}/4.png",
            f"{tmp_path}/out/3.png",
            f"{tmp_path}/root2/5.png",
            "folder/3.png",
            "link.png",
        ]
        assert keys(find_images(root / name, allow_outside=True)) == sorted([*inside, *found])
    findings = find_images(root / "t.parquet")
    assert keys(findings) == [f"t.parquet/{n}" for n in range(3)]
    assert reasons(findings) == {f"t.parquet/{n}": OUTSIDE for n in range(3, 8)}
    sources = find_images(root / "t.parquet", allow_outside=True).sources
    assert [source.read() for source in sources] == [PNG] * 8
    # A folder is the user's own choice.
    assert keys(find_images(root)) == ["1.png", "folder/3.png", "in/2.png", "inner/2.png", "link.png"] + [
        f"t.parquet/{n}" for n in range(3)
    ]


def test_two_images_of_one_key_are_an_error_that_names_both(tmp_path: Path) -> None:
    write(tmp_path, {"d/t.tar/1.png": PNG, "t.tar": make_tar({"1.png": PNG})})
    (tmp_path / "d/list.txt").write_text(f"t.tar/1.png\n{tmp_path}/d/t.tar/1.png\n")
    assert keys(find_images(tmp_path / "d/list.txt")) == ["t.tar/1.png"]
    record = {"image": ["data:image/png;base64," + b64encode(PNG).decode(), "r.json/0/0"]}
    (tmp_path / "r.json").write_text(json.dumps([record]))
    with pytest.raises(
        ImageError, match=r"r\.json/0/0: the key of two images, in .*/r\.json and .*/r\.json/0/0"
    ):
        find_images(tmp_path / "r.json")


@pytest.mark.parametrize("make", [make_parquet, make_arrow])
def test_rows_have_an_image_several_or_none(tmp_path: Path, make: Any) -> None:
    path = tmp_path / ("t.parquet" if make is make_parquet else "t.arrow")
    images = [image("PNG", n) for n in range(3)]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    named = [{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(images)]
    for kind, rows in ((pa.binary(), images), (struct, named), (pa.large_binary(), images)):
        path.write_bytes(make({"image": pa.array([rows[0], None, rows[1], rows[2]], kind)}))
        contents = {}
        for source in find_images(path).sources:
            if source.key.endswith("/1"):
                with pytest.raises(NoImageError, match="/1: a row without an image"):
                    source.read()
            else:
                contents[source.key[-1]] = source.read()
        assert contents == {"0": images[0], "2": images[1], "3": images[2]}
        for list_kind in (pa.list_(kind), pa.large_list(kind)):
            path.write_bytes(make({"images": pa.array([rows[:2], [], None, rows[2:]], list_kind)}))
            sources = find_images(path).sources
            assert [source.key.partition("/")[2] for source in sources] == ["0/0", "0/1", "3/0"]
            assert [source.read() for source in sources] == images


def test_two_columns_of_images_need_a_choice(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(make_parquet({"photo": [PNG], "mask": [image("GIF")], "name": ["a"]}))
    with pytest.raises(ImageError, match=r"t\.parquet: several columns .*photo, mask.*--column"):
        find_images(path)
    assert find_images(path, column="mask").sources[0].read() == image("GIF")
    with pytest.raises(ImageError, match="has no column nothing"):
        find_images(path, column="nothing")


def test_fingerprints_change_with_the_file_that_holds_the_bytes(tmp_path: Path) -> None:
    write(tmp_path, {"1.png": PNG, "t.tar": make_tar({"1.png": PNG})})
    (tmp_path / "list.txt").write_text("1.png")
    (tmp_path / "r.jsonl").write_text('{"image": "1.png"}')
    (tmp_path / "data.json").write_text(
        json.dumps([{"image": "data:image/png;base64," + b64encode(PNG).decode()}])
    )
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for name, make in (("s.parquet", make_parquet), ("s.arrow", make_arrow)):
        (tmp_path / name).write_bytes(make({"image": pa.array([{"bytes": None, "path": "1.png"}], kind)}))
    (tmp_path / "names.parquet").write_bytes(make_parquet({"image": ["1.png"]}))
    names = ["list.txt", "r.jsonl", "s.parquet", "s.arrow", "names.parquet"]
    cases = dict.fromkeys(names, "1.png") | {"t.tar": "t.tar", "data.json": "data.json"}
    for name, file in cases.items():
        (old,) = find_images(tmp_path / name).sources
        os.utime(tmp_path / file, ns=(0, old.fingerprint[-1] + 1))
        (new,) = find_images(tmp_path / name).sources
        assert old.key == new.key
        assert old.fingerprint != new.fingerprint, name
        assert new.read() == PNG
    shutil.move(tmp_path / "1.png", tmp_path / "2.png")
    for name in names:
        assert (
            len(find_images(tmp_path / name).sources) == 1
        )  # it fails when it is read, and is not passed over


def test_nothing_found_says_what_was_there(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"A.", "b.tar.gz": gzip.compress(b"1"), "c.png": b""})
    with pytest.raises(
        ImageError, match=r"no image found; images: 3 seen, 0 used, 3 left out .*1 compressed"
    ):
        find_images(tmp_path)
    with pytest.raises(ImageError, match=r"b\.tar\.gz: no image found.*1 compressed \(decompress it\)"):
        find_images(tmp_path / "b.tar.gz")
    with pytest.raises(ImageError, match="nowhere: no such file or folder"):
        find_images(tmp_path / "nowhere")
