"""Which image a name in a record means, among those that are there."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple, Protocol
from unicodedata import normalize

from being_vl.errors import BeingVLError, RecordError
from being_vl.files import file_version, sha256
from being_vl.images.keys import folder_prefix, image_path, key_below
from being_vl.names import show_name
from being_vl.options import StrPath

if TYPE_CHECKING:
    from being_vl.images.encoded import ImageSource
    from being_vl.images.sources import Findings

MAX_PATH_LENGTH = 4096
"""Names that are longer are not looked up on disk."""
CONTAINERS_IN_MEMORY = 2
"""Files whose images are kept listed, while images that have moved are compared."""


class ImageSet(Protocol):
    """The keys of images below one root: those of a folder of grids, or those that `find_images` lists."""

    @property
    def title(self) -> str:
        """What messages call it."""

    @property
    def root(self) -> Path:
        """Folder that the keys are relative to."""

    @property
    def failures(self) -> Mapping[str, str]:
        """Key → reason, of images that could not be read; they are not among its keys."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """Path below the root → reason, of what was found beside the images and is none, or was not taken."""

    def __contains__(self, key: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def sha256(self, key: str) -> str:
        """Hex SHA-256 of the image file.

        Raises:
            OSError, ImageError: if it cannot be read.
        """


class ListedImages(dict[str, "ImageSource"]):
    """Images that are not quantized yet, by key.

    Args:
        findings: What `find_images` has found.
    """

    def __init__(self, findings: "Findings") -> None:
        super().__init__({source.key: source for source in findings.sources})
        self.root = findings.root
        self.title = str(findings.root)
        self.failures: dict[str, str] = {}
        self.left_out = {item.name: item.reason for item in findings.left_out}

    def sha256(self, key: str) -> str:
        """See `ImageSet`."""
        return hashlib.sha256(self[key].read()).hexdigest()


class Place(NamedTuple):
    """The number of an image's set, and the image's key in it."""

    number: int
    key: str


class ImageLookup:
    """Finds the images that names in records mean.

    A relative name means the image of that key; of several, the one beside the file of records. An absolute one means
    the file, or the image in a file, of that path. Unicode's ways to write the same name are one, and so are paths that
    links make the same. An absolute name below no root, such as one of data that have moved, means the image whose key
    ends like it, if its bytes are the same.

    Args:
        image_sets: Where to look.
        remedy: What is to be done about an image that is in none of them, for the error.
    """

    def __init__(self, image_sets: Sequence[ImageSet], remedy: str = "") -> None:
        self._sets = image_sets
        self._remedy = remedy
        self._prefixes = [folder_prefix(images.root) for images in image_sets]
        self._entries: dict[StrPath, set[str]] = {}
        self._is_outside: dict[StrPath, bool] = {}

    def path(self, place: Place) -> str:
        """The absolute path of an image; it need not exist any more."""
        return image_path(place.key, self._prefixes[place.number])

    def place(self, path: str) -> Place | None:
        """The image of an absolute path that `path` gave."""
        keys = (key_below(path, prefix) for prefix in self._prefixes)
        places = (Place(number, key) for number, key in enumerate(keys) if key in self._sets[number])
        return next(places, None) if path.startswith("/") else None

    def find(self, name: str, folder: StrPath | None = None) -> Place:
        """Find an image.

        Args:
            name: As a record has it.
            folder: Absolute path of the folder of the record's file.

        Raises:
            RecordError: if it is in no set, with the nearest reason; or if the name could mean two different images,
                which it names: of two sets, or of one and a file of that name in `folder`.
        """
        is_key = folder is not None and len(self._sets) == 1 and name in self._sets[0]
        if is_key and folder is not None and self._has_one_reading(name, folder):
            return Place(0, name)
        is_relative = not name.startswith("/")
        path = None if is_relative and folder is None else image_path(name, os.fspath(folder or ""))
        places = self._match_keys(name, path) or self._match_unicode(name, path)
        if path is not None:
            places = places or self._match_links(path) or self._match_content(path)
        if not places:
            raise self._missing_error(name, path)
        # Of several, the one of that key that lies beside the record's file: there both readings of the name agree.
        key = os.path.normpath(name)
        agreeing_places = [place for place in places if place.key == key and self.path(place) == path]
        place = self._choose(name, agreeing_places or places)
        if is_relative and folder is not None and path is not None:
            self._check_neighbour(name, path, folder, place)
        return place

    def _has_one_reading(self, key: str, folder: StrPath) -> bool:
        """Whether a key of the only set cannot be the name of another file in the folder of records, as most cannot."""
        if folder not in self._is_outside:
            prefix = folder_prefix(folder)
            self._is_outside[folder] = not prefix.startswith(self._prefixes[0])
            if prefix == self._prefixes[0]:
                self._entries[folder], self._is_outside[folder] = set(), True
        return self._is_outside[folder] and key.partition("/")[0] not in self._list_entries(folder)

    def _list_entries(self, folder: StrPath) -> set[str]:
        """What is in a folder of records, as it was when it was asked for first."""
        if folder not in self._entries:
            self._entries[folder] = _list_names(folder)
        return self._entries[folder]

    def _match_keys(self, name: str, path: str | None) -> list[Place]:
        """The images whose key or path it is."""
        places = []
        for number, images in enumerate(self._sets):
            prefix = self._prefixes[number]
            keys = {key_below(spelling, prefix) for spelling in (name, path) if spelling}
            places += [Place(number, key) for key in keys if key in images or key in images.failures]
        return places

    def _match_unicode(self, name: str, path: str | None) -> list[Place]:
        """The images whose key or path it is but for the way in which Unicode writes it."""
        if (path or name).isascii():
            return []
        places = []
        for number, images in enumerate(self._sets):
            prefix = normalize("NFC", self._prefixes[number])
            for spelling in filter(None, {name, path}):
                key = key_below(normalize("NFC", spelling), prefix)
                keys = [key] if key in images else []
                places += [Place(number, key) for key in (*keys, *self._unicode_keys[number].get(key, ()))]
        return list(dict.fromkeys(places))

    @cached_property
    def _unicode_keys(self) -> list[dict[str, list[str]]]:
        """For each set: key in Unicode's composed form → the keys that have it, of all that are not ASCII."""
        indices = []
        for images in self._sets:
            index: dict[str, list[str]] = {}
            for key in (key for keys in (images, images.failures) for key in keys if not key.isascii()):
                index.setdefault(normalize("NFC", key), []).append(key)
            indices.append(index)
        return indices

    def _match_links(self, path: str) -> list[Place]:
        """The images of that path, links resolved."""
        try:
            real_path = os.path.realpath(path) if len(path) <= MAX_PATH_LENGTH else path
        except (OSError, ValueError):
            return []
        keys = (key_below(real_path, prefix) for prefix in self._real_prefixes)
        return [
            Place(number, key)
            for number, (key, images) in enumerate(zip(keys, self._sets, strict=True))
            if key in images or key in images.failures
        ]

    @cached_property
    def _real_prefixes(self) -> list[str]:
        return [folder_prefix(os.path.realpath(images.root)) for images in self._sets]

    def _match_content(self, path: str) -> list[Place]:
        """The images whose key ends as the path does, and whose bytes are those at that path."""
        places = self._list_namesakes(path)
        content = _hash_image(path) if places else None
        return [place for place in places if content and self._hash(place) == content]

    def _list_namesakes(self, path: str) -> list[Place]:
        """The images whose key ends as the path does: with the file's name, or that of its file and its place in it."""
        container = _find_container(path)
        file_name = Path(container).name if container else ""
        end = f"{file_name}{path[len(container) :]}" if container and container != path else ""
        tails = dict.fromkeys((_tail(path), _tail(path).rpartition("/")[2]))
        places = [place for tail in tails for place in self._places_by_tail.get(tail, ())]
        return [place for place in places if f"/{place.key}".endswith(f"/{end}")] if end else places

    @cached_property
    def _places_by_tail(self) -> dict[str, list[Place]]:
        """The last two parts of a key → the images that have them."""
        places: dict[str, list[Place]] = {}
        for number, images in enumerate(self._sets):
            for key in images:
                places.setdefault(_tail(key), []).append(Place(number, key))
        return places

    def _choose(self, name: str, places: Sequence[Place]) -> Place:
        """One of the images that a name means, if all are the same one."""
        # What could not be read in one set may have been read in another.
        grids = [place for place in places if place.key in self._sets[place.number]]
        paths = {self.path(place) for place in grids}
        failures = [place for place in places if place not in grids and self.path(place) not in paths]
        if failures and not grids:
            images, key = self._sets[failures[0].number], failures[0].key
            reason = show_name(images.failures[key], 160)
            text = f"the image {_quote(name)} could not be read when {show_name(images.title, 80)} was made"
            raise RecordError(f"{text} ({reason})", "missing image")
        candidates = sorted([*grids, *failures], key=self.path)
        if len(candidates) > 1 and len({self._hash(place) for place in candidates}) > 1:
            raise self._ambiguity_error(name, candidates)
        return candidates[0]

    def _check_neighbour(self, name: str, path: str, folder: StrPath, place: Place) -> None:
        """Refuse a relative name if a file of that name beside the record's file is another image.

        Raises:
            RecordError: naming both files.
        """
        # Most often the folder has nothing that is called as the name begins.
        first_part = os.path.normpath(name).partition("/")[0]
        if first_part != ".." and first_part not in self._list_entries(folder):
            return
        other_path = self.path(place)
        container = None if path == other_path else _find_container(path)
        if container is None or os.path.realpath(path) == os.path.realpath(other_path):
            return
        content = _hash_image(path)
        if content != self._hash(place) and (content or container == path):
            raise self._ambiguity_error(name, [place], path)

    def _hash(self, place: Place) -> str | None:
        """SHA-256 of an image; None if it cannot be read."""
        try:
            images = self._sets[place.number]
            return images.sha256(place.key) if place.key in images else None
        except (OSError, BeingVLError):
            return None

    def _ambiguity_error(self, name: str, places: Sequence[Place], path: str | None = None) -> RecordError:
        """That a name could mean two images: those of two places, or of a path and a place."""
        paths = list(dict.fromkeys([*filter(None, [path]), *map(self.path, places)]))
        if len(paths) == 1:
            first, second = (f"as in {show_name(self._sets[place.number].title)}" for place in places[:2])
            first = f"{show_name(paths[0])} {first}"
        else:
            # Two ways to write the same letters look alike.
            is_alike = len({normalize("NFC", path) for path in paths[:2]}) == 1
            first, second = (show_name(ascii(path)[1:-1] if is_alike else path) for path in paths[:2])
        text = f"the image {_quote(name)} could be {first} or {second}, which are not the same image"
        return RecordError(text, "ambiguous image")

    def _find_reason(self, name: str, path: str | None) -> str | None:
        """Why an image, or a folder that it is in, was left out; None if it was not."""
        for images, prefix in zip(self._sets, self._prefixes, strict=True):
            for key in {key_below(spelling, prefix) for spelling in (name, path) if spelling}:
                if len(key) > MAX_PATH_LENGTH or not images.left_out:
                    continue
                folders = (f"{folder}/" for folder in PurePosixPath(key).parents)
                for left_out_name in (key, *folders):
                    if left_out_name in images.left_out:
                        return images.left_out[left_out_name]
        return None

    def _missing_error(self, name: str, path: str | None) -> RecordError:
        """That an image is nowhere, and why the nearest one is not it."""
        titles = [
            show_name(images.title, 80)
            + ("" if images.title == str(images.root) else f" (from {show_name(images.root, 80)})")
            for images in self._sets
        ]
        where = f"{', '.join(titles[:2])}{f' and {len(titles) - 2} more' if len(titles) > 2 else ''}"
        text = f"the image {_quote(name)} is not among those of {where}"
        if reason := self._find_reason(name, path):
            return RecordError(f"{text} (left out: {show_name(reason, 80)})", "missing image")
        if namesakes := self._list_namesakes(path or name):
            key = _quote(namesakes[0].key)
            if path is None or not name.startswith("/"):
                return RecordError(f"{text}; did you mean {key}?", "missing image")
            is_readable = _hash_image(path) is not None
            reason = (
                "holds another image"
                if is_readable
                else "may be it, but the image itself cannot be read to compare"
            )
            text += f" ({key} {reason})"
        return RecordError(f"{text}{self._remedy and '; '}{self._remedy}", "missing image")


def _list_names(folder: StrPath) -> set[str]:
    """What is in a folder; nothing if it cannot be read."""
    try:
        return {path.name for path in Path(folder).iterdir()}
    except OSError:
        return set()


def _tail(path: str) -> str:
    """The last two parts of a path."""
    return "/".join(path.rsplit("/", 2)[-2:])


def _quote(name: str) -> str:
    return f"'{show_name(name, 100)}'"


def _find_container(path: str) -> str | None:
    """The file at a path, or the file that holds the image of that path; None if there is neither."""
    if len(path) > MAX_PATH_LENGTH:
        return None
    try:
        return next((str(part) for part in (Path(path), *Path(path).parents) if part.is_file()), None)
    except (OSError, ValueError):
        return None


def _hash_image(path: str) -> str | None:
    """SHA-256 of an image file, or of an image within a file; None if it cannot be read."""
    container = _find_container(path)
    try:
        if container == path:
            return sha256(path)
        source = _list_images(container, file_version(container)).get(path) if container else None
        return hashlib.sha256(source.read()).hexdigest() if source else None
    except (OSError, BeingVLError):
        return None


@lru_cache(CONTAINERS_IN_MEMORY)
def _list_images(container: str, version: tuple[int, ...]) -> "dict[str, ImageSource]":
    """Path → image, of all images in a file, which is of that version."""
    from being_vl.images.sources import find_images

    prefix = folder_prefix(Path(container).parent)
    return {prefix + key_below(source.key, prefix): source for source in find_images(container).sources}
