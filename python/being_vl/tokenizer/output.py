"""The file that a command writes a vocabulary to, and the files beside it."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from being_vl.errors import FingerprintError
from being_vl.files import resolve_link
from being_vl.fingerprints import check_fingerprint, write_fingerprint
from being_vl.options import StrPath
from being_vl.outputs import check_file, lock_file, read_json
from being_vl.tokenizer.visual_bpe import VisualBPE

log = logging.getLogger(__name__)

_CONTENTS = {
    "": ("vocabulary", {"format", "merges", "base_vocab_size"}),
    ".partial": ("vocabulary", {"format", "merges", "base_vocab_size"}),
    ".report": ("report on a vocabulary", {"vocabulary", "num_merges", "statistics"}),
    ".fingerprint": ("fingerprint of a vocabulary", {"kind"}),
}
"""Between a vocabulary's name and `.json`: what such a file is called, and keys that it has."""


def check_vocabulary_output(path: StrPath, inputs: Iterable[StrPath] = ()) -> None:
    """Refuse a path as that of a vocabulary if there is anything else, also under the names of the files beside it.

    Args:
        path: The vocabulary's file.
        inputs: What it is made from.

    Raises:
        OutputError: if it is refused.
    """
    path = resolve_link(path)
    for part, (what, keys) in _CONTENTS.items():

        def has_keys(file: Path, keys: set[str] = keys) -> bool:
            return keys <= read_json(file).keys()

        check_file(_path_beside(path, part) if part else path, has_keys, what, inputs)


def _path_beside(path: Path, part: str) -> Path:
    """The path of a file beside a vocabulary's; `part` stands between the name and `.json`."""
    return path.with_name(f"{path.stem}{part}.json")


class VocabularyOutput:
    """A vocabulary's file `NAME.json`, which appears when it is complete, and the files beside it.

    `NAME.fingerprint.json` holds the options and inputs that the vocabulary follows from, and is written first.
    `NAME.partial.json` is what an unfinished training has learned, a vocabulary like any other. `NAME.report.json` is
    the report of a training.

    Args:
        path: The vocabulary's file.
        fields: Name → value of the options and inputs that decide the vocabulary.
        overwrite: Replace a vocabulary, finished or partial, that follows from other ones.

    Raises:
        FingerprintError: if there is one that follows from others, or it is not known from what; unless `overwrite`.
        OutputError: if there is anything else, or another process is writing it.
    """

    def __init__(self, path: StrPath, fields: Mapping[str, Any], overwrite: bool) -> None:
        check_vocabulary_output(path)
        lock_file(path)
        path = resolve_link(path)
        self.path = path
        self.partial_path = _path_beside(path, ".partial")
        self.report_path = _path_beside(path, ".report")
        self._fingerprint_path = _path_beside(path, ".fingerprint")
        self._fields = {"kind": "vocabulary", **fields}
        try:
            self._check()
        except FingerprintError:
            if not overwrite:
                raise
            self._remove()

    def load_finished(self) -> VisualBPE | None:
        """The vocabulary, if it was finished before."""
        if not self.path.exists():
            return None
        bpe = VisualBPE.load(self.path)
        log.info("%s: finished before, kept", self.path)
        return bpe

    def load_partial(self) -> VisualBPE | None:
        """What an unfinished training has learned, if there was one."""
        if not self.partial_path.exists():
            return None
        bpe = VisualBPE.load(self.partial_path)
        log.info("%s: going on after %d merges", self.partial_path, bpe.num_merges)
        return bpe

    def save_partial(self, bpe: VisualBPE) -> None:
        """Write what was learned so far, once there is something to keep."""
        if not bpe.num_merges:
            return
        try:
            self._write(bpe, self.partial_path)
        except KeyboardInterrupt:  # in the middle of writing
            self._write(bpe, self.partial_path)
            raise

    def save(self, bpe: VisualBPE) -> None:
        """Write the finished vocabulary."""
        self._write(bpe, self.path)
        self.partial_path.unlink(missing_ok=True)

    def _write(self, bpe: VisualBPE, path: Path) -> None:
        write_fingerprint(self._fingerprint_path, self._fields)
        bpe.save(path)

    def _check(self) -> None:
        outputs = [path for path in (self.path, self.partial_path) if path.exists()]
        if outputs and not check_fingerprint(self._fingerprint_path, self._fields, str(self.path)):
            raise FingerprintError(
                f"{outputs[0]}: it is not known what it follows from, as there is no {self._fingerprint_path.name}; "
                "give --overwrite to replace it, or another output"
            )

    def _remove(self) -> None:
        """Delete the vocabulary of another job."""
        for path in (self.path, self.partial_path, self.report_path, self._fingerprint_path):
            path.unlink(missing_ok=True)
