"""Where images come from: folders, lists of files, files of records, tars, tables.

What is there is told by its content. Everything that a search comes upon is either a source or left out with a reason.
"""

import codecs
import os
import posixpath
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from being_vl.account import Account
from being_vl.errors import ImageError, RecordError
from being_vl.files import file_version
from being_vl.hub import find_blobs, local_path
from being_vl.images.encoded import ImageFile, ImageSource, RecordImage, TarMember
from being_vl.images.files import (
    EMPTY,
    NOT_REGULAR,
    NOT_UTF_8,
    UNREADABLE,
    FolderFile,
    FolderWalk,
    LeftOut,
    is_text,
    open_file,
    suffix_of,
)
from being_vl.images.formats import SUFFIXES, find_format, sniff_other_format
from being_vl.images.keys import image_key
from being_vl.images.readers import open_records
from being_vl.images.references import NAME_BYTES, read_references
from being_vl.images.rows import NamesColumnError, NoColumnError, find_table_images
from being_vl.images.tars import list_members
from being_vl.names import show_name
from being_vl.options import StrPath

HEAD = 512
"""Bytes at a file's beginning that tell what it is: a tar's first header."""
MAX_SUFFIXES = 6
"""Suffixes of files without images that an account names."""

OUTSIDE = "outside the root (taken with allow_outside)"
COMPRESSED = "compressed (decompress it)"
POINTER = "a Git LFS pointer (run git lfs pull)"
CACHE = "a cache of datasets"
NO_COLUMN = "a table without images"
NAMES_COLUMN = "a table that names images (give it by itself)"
BROKEN_TABLE = "a damaged table beside a tar"
NO_IMAGE_IN_RECORD = "record without an image"
URL = "a URL (download it)"
QUOTED = "in quotes (write the bare name)"
FOLDER = "a folder (list its files)"
TOO_LONG = "a name too long"

_LISTS = (".txt",)
_RECORDS = (".json", ".jsonl")
_TABLES = (".parquet", ".arrow", ".feather", ".ipc")
_DATASETS_FILES = ("state.json", "dataset_info.json")
_COMPRESSED = re.compile(
    rb"\x1f\x8b|BZh[1-9]|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|\x04\x22\x4d\x18|PK\x03\x04|7z\xbc\xaf\x27\x1c|Rar!|\x1f\x9d"
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True)
class Findings:
    """What a search for images has come upon.

    Args:
        root: Folder that keys are relative to; absolute.
        sources: The images, in the order of their keys, each of which occurs once.
        left_out: What is not used, by name.
        unnamed: Reason → how many things are not used that need no name.
    """

    root: Path
    sources: list[ImageSource]
    left_out: list[LeftOut]
    unnamed: Counter[str]

    def account(self) -> Account:
        """How many images were found, and what was left out."""
        reasons = Counter(self.unnamed)
        for item in self.left_out:
            reasons[item.reason] += item.count
        return Account("images", len(self.sources), reasons)


def find_images(
    path: StrPath, root: StrPath | None = None, allow_outside: bool = False, column: str | None = None
) -> Findings:
    """All images that `path` names.

    A file's key is its path relative to the root, or its absolute path if it is outside. That of an image in a file is
    the file's key with the image's place behind it: `TAR/MEMBER`, `TABLE/ROW`, `TABLE/ROW/POSITION` of a list,
    `FILE.json/RECORD`.

    Args:
        path: One of

            - a folder: all images, tars and tables in it and its subfolders, also behind links;
            - `.txt`: a list of files, one a line: images, tars and tables;
            - `.json`, `.jsonl`: records, which name image files or hold images;
            - an uncompressed tar, such as WebDataset's: its members that are images;
            - a Parquet or Arrow table of images, or one of records that name image files;
            - `hf://datasets/OWNER/NAME` and the like: a dataset of the hub, or a part of it; see `local_path`.
        root: Folder that keys are relative to, and names in a list or in records; by default the folder, or the file's.
        allow_outside: Take files outside the root that a list, records or a table name.
        column: Of a table: the column with the images; needed where several could be it.

    Raises:
        ImageError: if there is no image, two have the same key, or a file is damaged as a whole.
    """
    path = local_path(path)
    if not path.exists():
        raise ImageError(
            f"{show_name(path)}: no such file or folder; expected images, or a dataset of the hub as "
            "hf://datasets/OWNER/NAME"
        )
    is_folder = path.is_dir()
    default_root = path if is_folder else path.parent
    search = _Search(_absolute(default_root if root is None else local_path(root)), allow_outside, column)
    if is_folder:
        search.search_folder(_absolute(path))
    else:
        search.search_file(_absolute(path.parent) / path.name)
    if not search.sources:
        account = Findings(search.root, [], search.left_out, search.counts()).account()
        raise ImageError(f"{show_name(path)}: no image found; {account.describe()}")
    sources = [search.sources[key] for key in sorted(search.sources)]
    return Findings(
        search.root, sources, sorted(search.left_out, key=lambda item: item.name), search.counts()
    )


def _absolute(folder: Path) -> Path:
    """A folder's absolute path; its links are kept but those in front of a `..`, which lead elsewhere."""
    parts = folder.absolute().parts
    if ".." not in parts:
        return Path(*parts)
    count = len(parts) - parts[::-1].index("..")
    return Path(os.path.realpath(Path(*parts[:count])), *parts[count:])


@dataclass
class _Search:
    """Collects the images of one job."""

    root: Path
    allow_outside: bool
    column: str | None
    sources: dict[str, ImageSource] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    unnamed: Counter[str] = field(default_factory=Counter)
    suffixes: Counter[str] = field(default_factory=Counter)
    other_names: set[str] = field(default_factory=set)
    folders: dict[str, bool] = field(default_factory=dict)
    real_root: str = ""
    blobs: str | None = None

    def __post_init__(self) -> None:
        self.real_root = posixpath.join(os.path.realpath(self.root), "")
        self.blobs = find_blobs(self.real_root)

    def counts(self) -> Counter[str]:
        """Reasons of what is counted only; files without images by their suffixes."""
        counts = Counter(self.unnamed)
        for number, (suffix, count) in enumerate(self.suffixes.most_common()):
            kind = show_name(suffix, 12) or "no suffix"
            counts[f"not an image ({kind if number < MAX_SUFFIXES else 'other suffixes'})"] += count
        return counts

    def search_folder(self, folder: Path) -> None:
        """Take all that is in a folder."""
        prefix = "" if folder == self.root else image_key(folder, self.root) + "/"
        walk = FolderWalk(folder)
        for file in walk.files():
            key = prefix + file.name
            if suffix_of(key) in SUFFIXES:
                self.add(ImageFile(key, file.path, file.version))
                continue
            try:
                self.add_sniffed(key, file)
            except NoColumnError:
                self.leave(key, NO_COLUMN)
            except NamesColumnError:
                self.leave(key, NAMES_COLUMN)
        self.left_out += (
            walk.left_out
            if not prefix
            else [LeftOut(prefix + item.name, item.reason, item.detail, item.count) for item in walk.left_out]
        )

    def search_file(self, path: Path) -> None:
        """Take what a file holds or names."""
        suffix = suffix_of(path.name)
        if suffix in _LISTS:
            self.add_list(path)
        elif suffix in _RECORDS:
            self.add_records(path)
        else:
            key = image_key(path, self.root)
            if suffix in SUFFIXES:
                raise _kind_error(path)
            num_sources = len(self.sources)
            try:
                self.add_sniffed(key, FolderFile(key, str(path), _version(path)))
            except NamesColumnError:
                self.add_records(path)
            if self.suffixes[suffix] and len(self.sources) == num_sources:
                raise _kind_error(path)

    def add(self, source: ImageSource) -> None:
        """Take an image.

        Raises:
            ImageError: if another one has the same key.
        """
        other = self.sources.setdefault(source.key, source)
        if other is not source and other != source:
            raise ImageError(
                f"{show_name(source.key)}: the key of two images, in {show_name(other.place)} and "
                f"{show_name(source.place)}; quantize them into two folders, or rename one"
            )

    def leave(self, name: str, reason: str, detail: str = "") -> None:
        """Leave something out, by its name."""
        self.left_out.append(LeftOut(name, reason, detail))

    def add_sniffed(self, key: str, file: FolderFile) -> None:
        """Take a file that is not named as an image: an image, a tar, a table, or nothing of these."""
        try:
            with open_file(file.path) as stream:
                head = stream.read(HEAD)
        except OSError as error:
            self.leave(key, UNREADABLE, error.strerror or "")
            return
        suffix = suffix_of(file.path)
        if head.startswith(b"version https://git-lfs"):
            self.leave(key, POINTER)
        elif head[257:262] == b"ustar" or (suffix == ".tar" and not _COMPRESSED.match(head)):
            self.add_tar(key, file)
        elif head.startswith((b"PAR1", b"ARROW1")) or suffix in _TABLES:
            self.add_table(key, file)
        elif _COMPRESSED.match(head):
            self.leave(key, COMPRESSED)
        elif find_format(head, file.path):
            self.add(ImageFile(key, file.path, file.version))
        elif other_format := sniff_other_format(head):
            self.leave(key, f"{other_format}, a format that is not read")
        else:
            self.suffixes[suffix] += 1

    def add_tar(self, key: str, file: FolderFile) -> None:
        """Take the images in a tar."""
        try:
            listing = list_members(file.path)
        except (tarfile.TarError, OSError) as error:
            reason = show_name(getattr(error, "strerror", None) or error)
            raise ImageError(f"{file.path}: not a complete uncompressed tar file ({reason})") from None
        for member in listing.members:
            if not member.is_image:
                self.suffixes[suffix_of(member.name)] += 1
            elif not member.size:
                self.leave(f"{key}/{member.name}", EMPTY)
            else:
                name = f"{key}/{member.name}"
                self.add(TarMember(name, file.path, file.version, member.offset, member.size))
        self.left_out += (LeftOut(f"{key}/{name}", reason) for name, reason in listing.left_out)

    def add_table(self, key: str, file: FolderFile) -> None:
        """Take the images in a table, but of the caches that `datasets` keeps beside its own."""
        path = Path(file.path)
        is_cache_name = path.name.startswith("cache-") and path.suffix == ".arrow"
        if is_cache_name and any((path.parent / name).exists() for name in _DATASETS_FILES):
            self.leave(key, CACHE)
            return
        try:
            images = list(find_table_images(path, key, self.column, self.check_file))
        except (NoColumnError, NamesColumnError):
            raise
        except ImageError as error:
            if not path.with_suffix(".tar").exists():
                raise
            self.leave(key, BROKEN_TABLE, str(error))
            return
        for image in images:
            if isinstance(image, LeftOut):
                self.left_out.append(image)
            else:
                self.add(image)

    def add_list(self, path: Path) -> None:
        """Take the files that a list names, one a line."""
        for line in _read_lines(path):
            name = line.removeprefix("file://")
            if _URL.match(name):
                self.leave(name, URL)
            elif (
                len(name) > 2 and name[0] == name[-1] and name[0] in "\"'" and not (self.root / name).exists()
            ):
                self.leave(name, QUOTED)
            else:
                self.add_named(name)

    def add_records(self, path: Path) -> None:
        """Take the images that records name or hold."""
        version = _version(path)
        key = image_key(path, self.root)
        container = f"{path}/"
        try:
            reader = open_records(path)
        except RecordError as error:
            raise ImageError(str(error)) from None
        for index, item in enumerate(reader.read(0, len(reader))):
            location = f"{path}: record {index}"
            try:
                if isinstance(item, RecordError):
                    raise item
                if not isinstance(item, dict):
                    raise RecordError(f"{location}: no JSON object; expected a record")
                references = read_references(item, location, path, index)
            except RecordError as error:
                self.leave(f"{key}: record {index}", error.kind, show_name(error, 500))
                continue
            self.unnamed[NO_IMAGE_IN_RECORD] += not references
            for position, reference in enumerate(references):
                if reference.name.startswith(container):
                    name = image_key(reference.name, self.root)
                    self.add(RecordImage(name, str(path), version, index, position))
                else:
                    self.add_named(reference.name)

    def add_named(self, name: str) -> None:
        """Take a file that a list or a record names; one that is not there is a source that cannot be read."""
        if not is_text(name) or len(name) > NAME_BYTES:
            self.leave(show_name(name), TOO_LONG if is_text(name) else NOT_UTF_8)
            return
        key = image_key(name, self.root)
        path = posixpath.join(self.root, key)
        other = self.sources.get(key)
        if key in self.other_names or (isinstance(other, ImageFile) and other.place == path):
            return
        if reason := self.check_file(path):
            self.other_names.add(key)
            self.leave(name, reason)
            return
        version = _version(path)
        if version and suffix_of(path) in (".tar", *_TABLES):
            self.other_names.add(key)
            self.add_sniffed(key, FolderFile(key, path, version))
        else:
            self.add(ImageFile(key, path, version))

    def check_file(self, path: str) -> str:
        """Why a file that is named somewhere is left out; empty if it is not, or is missing."""
        if not self.allow_outside and not self._is_inside(path):
            return OUTSIDE
        try:
            status = Path(path).stat()
        except (OSError, ValueError):
            return ""
        if stat.S_ISDIR(status.st_mode):
            return FOLDER
        if not stat.S_ISREG(status.st_mode):
            return NOT_REGULAR
        return "" if status.st_size else EMPTY

    def _is_inside(self, path: str) -> bool:
        """Whether a file is below the root, also when links are followed."""
        folder = posixpath.dirname(path)
        if folder not in self.folders:
            real_folder = posixpath.join(os.path.realpath(folder), "")
            self.folders[folder] = real_folder.startswith(self.real_root)
        if not self.folders[folder] or image_key(path, self.root).startswith("/"):
            return False
        if not Path(path).is_symlink():
            return True
        real_path = os.path.realpath(path)
        return real_path.startswith(self.real_root) or bool(self.blobs and real_path.startswith(self.blobs))


def _version(path: StrPath) -> tuple[int, ...]:
    try:
        return file_version(path)
    except ValueError:  # no file can have that name
        return ()


def _read_lines(path: Path) -> Iterator[str]:
    """The lines of a list that are not blank; UTF-8 or, with its mark, UTF-16."""
    with open_file(path) as file:
        data = file.read()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = data.decode("utf-16", "replace")
    else:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    if "\0" in text:
        raise ImageError(f"{path}: no text; expected a list of files, one a line")
    return (line.strip() for line in text.split("\n") if not line.isspace() and line)


def _kind_error(path: Path) -> ImageError:
    ends = ", ".join([*_LISTS, *_RECORDS, ".tar", ".parquet", ".arrow"])
    return ImageError(
        f"{show_name(path)}: expected a folder or a file that ends in {ends}; for one image give its folder"
    )
