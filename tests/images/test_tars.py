"""Listing of tars: replaced members, links, appended and cut archives, and damage of every kind."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from being_vl.images.tars import list_members

PNG = b"\x89PNG\r\n\x1a\n"
SYMLINK, HARD_LINK = tarfile.SYMTYPE, tarfile.LNKTYPE


def add(
    tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(data), kind, link
    tar.addfile(member, io.BytesIO(data))


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w", format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, mode, format=format) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            add(tar, name, data)
    return path


def read_members(path: Path) -> dict[str, bytes]:
    """Content by name, through the listing."""
    data = path.read_bytes()
    return {m.name: data[m.offset : m.offset + m.size] for m in list_members(path).members}


def test_the_last_member_of_a_name_counts_at_the_place_of_the_first(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"./1.png": b"old", "1.txt": b"old text", "2.png": b"2"})
    write_tar(path, {"1.txt": b"new text", ".//1.png": b"new"}, "a")
    assert list(read_members(path).items()) == [("1.png", b"new"), ("1.txt", b"new text"), ("2.png", b"2")]
    assert sorted(list_members(path).left_out) == [
        ("1.png", "replaced by a later member of its name"),
        ("1.txt", "replaced by a later member of its name"),
    ]


def test_links_are_the_files_that_they_lead_to(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a/1.png", b"first")
        add(tar, "a/hard.png", kind=HARD_LINK, link="./a/1.png")
        add(tar, "b/soft.png", kind=SYMLINK, link="../a/1.png")
        add(tar, "b/absolute.png", kind=SYMLINK, link="/a/hard.png")
        add(tar, "b/chain.png", kind=SYMLINK, link="soft.png")
        add(tar, "b/of_chain.png", kind=HARD_LINK, link="b/chain.png")
        add(tar, "a/loop.png", kind=SYMLINK, link="loop.png")
        add(tar, "a/above.png", kind=SYMLINK, link="../../a/1.png")
        add(tar, "a/folder.png", kind=SYMLINK, link="../b")
        add(tar, "a/early.png", kind=HARD_LINK, link="late.png")
        add(tar, "late.png", b"late")
        add(tar, "a/1.png", b"second")  # a hard link keeps what was there, a symbolic one follows the name
    assert read_members(path) == {
        "a/1.png": b"second",
        "a/hard.png": b"first",
        "b/soft.png": b"second",
        "b/absolute.png": b"first",
        "b/chain.png": b"second",
        "b/of_chain.png": b"second",
        "late.png": b"late",
    }
    lost = {name for name, reason in list_members(path).left_out if reason == "a link to no file in the tar"}
    assert lost == {"a/loop.png", "a/above.png", "a/folder.png", "a/early.png"}


def test_what_is_no_file_or_has_no_proper_name_is_left_out_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "._1.png", b"resource fork of a Mac")
        add(tar, "a/.git/1.png", b"1")
        add(tar, "./.", kind=tarfile.DIRTYPE)
        add(tar, "folder.png", kind=tarfile.DIRTYPE)
        add(tar, "pipe.png", kind=tarfile.FIFOTYPE)
        add(tar, "device.png", kind=tarfile.CHRTYPE)
        add(tar, "vendor.png", kind=b"Z")
        add(tar, "latin-\udce9.png", b"1")
        add(tar, "é.png", b"1")
    assert read_members(path) == {"é.png": b"1"}
    assert dict(list_members(path).left_out) == {
        "._1.png": "hidden",
        "a/.git/1.png": "hidden",
        "pipe.png": "not a regular file",
        "device.png": "not a regular file",
        "vendor.png": "not a regular file",
        "latin-\udce9.png": "a name that is not UTF-8",
    }


def test_a_sparse_member_is_left_out_and_the_next_one_found(tmp_path: Path) -> None:
    header = tarfile.TarInfo("sparse.png")
    header.size, header.type = 512, tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[386:410], block[483:495] = b"00000000000\0" + b"00000001000\0", b"00010000000\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    rest = write_tar(tmp_path / "rest.tar", {"1.png": b"1"}).read_bytes()
    (tmp_path / "a.tar").write_bytes(bytes(block) + bytes(512) + rest)
    assert read_members(tmp_path / "a.tar") == {"1.png": b"1"}
    assert list_members(tmp_path / "a.tar").left_out == (("sparse.png", "a sparse member"),)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_are_told_by_content_whatever_the_format_of_the_tar(tmp_path: Path, format: int) -> None:
    folder = "x" * 60 + "/" + "y" * 60
    names = ["1", "2.JPEG", "3.jfif", "4.bin", "5.png.txt", f"{folder}/6.png"]
    files = dict(zip(names, [PNG, b"", b"x", PNG, b"text", b"6"], strict=True))
    listing = list_members(write_tar(tmp_path / "a.tar", files, format=format))
    assert [(m.name, m.is_image) for m in listing.members] == [
        (name, name not in ("5.png.txt",)) for name in names
    ]


def test_names_stay_below_the_folder_that_a_tar_is_unpacked_in(tmp_path: Path) -> None:
    names = ["../1.png", "/2.png", "a/../3.png", "a//4.png", "./a/./5.png", "..a/6.png"]
    path = write_tar(tmp_path / "a.tar", dict.fromkeys(names, b"1"))
    assert [m.name for m in list_members(path).members] == ["1.png", "2.png", "3.png", "a/4.png", "a/5.png"]
    assert list_members(path).left_out == (("..a/6.png", "hidden"),)


def test_archives_behind_the_end_mark_are_read(tmp_path: Path) -> None:
    parts = [write_tar(tmp_path / f"{n}.tar", {f"{n}.png": b"%d" % n}).read_bytes() for n in range(3)]
    for number, gap in enumerate((b"", bytes(512), bytes(1 << 21))):
        path = tmp_path / f"all{number}.tar"
        path.write_bytes(gap.join(parts) + gap)
        assert read_members(path) == {f"{n}.png": b"%d" % n for n in range(3)}
    path.write_bytes(b"".join(parts)[:-9500])
    with pytest.raises(tarfile.TarError, match="no end mark"):
        list_members(path)


def test_a_tar_that_is_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{n}.png": bytes(600) for n in range(3)})
    data = path.read_bytes()
    end = 3 * 3 * 512
    for size in [*range(1, 2 * 512, 97), *range(512, end + 512, 512), end - 1, end + 1, end + 511]:
        if size == end + 512:  # one block of zeros is an end mark
            continue
        path.write_bytes(data[:size])
        with pytest.raises(tarfile.TarError):
            list_members(path)
    path.write_bytes(data[: end + 512])
    assert len(list_members(path).members) == 3
    path.write_bytes(data + b"behind the end")
    with pytest.raises(tarfile.TarError, match="header at byte"):
        list_members(path)


def mend_checksum(data: bytearray, start: int) -> None:
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])


def test_damaged_headers_are_errors_of_tars_and_nothing_else(tmp_path: Path) -> None:
    """Sizes that are negative or huge among them, which would have no end or take all memory."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("1.png", "x" * 200 + ".png", "é.png"):
            add(tar, name, b"12")
        add(tar, "link.png", kind=SYMLINK, link="1.png")
    original, rng = path.read_bytes(), np.random.default_rng(0)
    starts = [
        start
        for start in range(0, len(original) - 9000, 512)
        if original[start + 257 : start + 262] == b"ustar"
    ]
    values = np.frombuffer(b"0xgXLKS127\x80\xff\0", np.uint8)
    outcomes = set()
    for _ in range(300):
        data, start = bytearray(original), int(rng.choice(starts))
        for place in (int(rng.integers(512)), int(rng.integers(124, 136)), 156)[: rng.integers(1, 4)]:
            data[start + place] = rng.choice(values)
        mend_checksum(data, start)
        path.write_bytes(data)
        try:
            outcomes.add(len(list_members(path).members))
        except tarfile.TarError:
            outcomes.add(-1)
    assert {-1, 4} <= outcomes
    data = bytearray(original)
    for size in (b"\x80" + bytes(2) + b"\x7f" * 9, b"\xff" * 12, b"77777777777\0"):
        for kind in (b"0", b"x", b"L", b"Z"):
            data[124:136], data[156:157] = size, kind
            mend_checksum(data, 0)
            path.write_bytes(data)
            with pytest.raises(tarfile.TarError):
                list_members(path)
