"""The file that a command writes a vocabulary to, and the files beside it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from being_vl.errors import ConfigError, FingerprintError, VocabularyError
from being_vl.fingerprints import check_fingerprint, write_fingerprint
from being_vl.options import StrPath
from being_vl.tokenizer.visual_bpe import VisualBPE

log = logging.getLogger(__name__)


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
        ConfigError: if `path` is a folder, or a file to replace is no vocabulary.
    """

    def __init__(self, path: StrPath, fields: Mapping[str, Any], overwrite: bool) -> None:
        path = Path(path)
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; expected the name of a file")
        self.path = path
        self.partial_path = path.with_name(path.stem + ".partial.json")
        self.report_path = path.with_name(path.stem + ".report.json")
        self._fingerprint_path = path.with_name(path.stem + ".fingerprint.json")
        self._fields = fields
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
        """Delete the vocabulary of another job; a file of unknown origin only if it is a vocabulary."""
        if self.path.exists() and not self._fingerprint_path.exists():
            try:
                VisualBPE.load(self.path)
            except VocabularyError as error:
                raise ConfigError(f"{error}; a file that is no vocabulary is not overwritten") from None
        for path in (self.path, self.partial_path, self.report_path, self._fingerprint_path):
            path.unlink(missing_ok=True)
