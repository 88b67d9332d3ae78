"""A job that fills a folder with Arrow files: shared out over ranks, stopped at any moment and continued later.

`quantize`, `prepare` and `encode` are such jobs. What is on disk is all that their ranks know of each other:

1. Rank 0 claims the folder: it takes its lock, writes `fingerprint.json` and removes the manifest. The other ranks wait
   for that.
2. Each rank makes every n-th of the shards that are not there yet. A shard appears under its name when it is complete,
   and holds the fingerprint of what it was made from. So a job that is started again keeps those whose inputs are the
   same.
3. Rank 0 waits until all shards are there, removes those that an earlier job has left, and writes the manifest.
"""

import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa

from being_vl.errors import FingerprintError, OutputError
from being_vl.files import MANIFEST, TEMPORARY, read_manifest, sha256, to_jsonable, write_manifest
from being_vl.fingerprints import FINGERPRINT, check_fingerprint, compute_fingerprint, write_fingerprint
from being_vl.options import StrPath
from being_vl.outputs import check_folder, current_job, job_of_lock, lock_folder, unlock_folder
from being_vl.shards.arrow import is_intact, read_metadata, shard_path, write_table
from being_vl.shards.ranks import rank_and_world_size

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
"""How often a rank looks for what it waits for from others."""
LOG_SECONDS = 60.0
"""How often it says what it waits for."""

Inputs = TypeVar("Inputs")


@dataclass(frozen=True)
class Shard(Generic[Inputs]):
    """One Arrow file of a job; picklable if its inputs are.

    Args:
        path: The file.
        inputs: What it is made from.
        fingerprint: Of all that its content follows from.
    """

    path: Path
    inputs: Inputs
    fingerprint: str

    def metadata(self) -> dict[str, Any] | None:
        """The file's metadata; None if the file is not there yet, or was made from something else."""
        metadata = read_metadata(self.path)
        return metadata if metadata and metadata.get("fingerprint") == self.fingerprint else None

    def is_complete(self) -> bool:
        """Whether the file is there, was made from the same inputs, and has not been changed since."""
        return self.metadata() is not None and is_intact(self.path)

    def write(self, columns: Mapping[str, pa.Array], metadata: Mapping[str, Any]) -> None:
        """Write the file; it appears only when complete."""
        write_table(self.path, columns, {"fingerprint": self.fingerprint, **metadata})


class ShardedJob(Generic[Inputs]):
    """A folder of shards, made by one process or by the ranks of torchrun together.

    Args:
        folder: Where the shards go.
        kind: Kind of the manifest, and the beginning of the shards' names.
        fingerprint: Name → value of the options and inputs that decide the output. The content of inputs that may
            change without the output being another one, such as a folder of images, belongs to the shards instead.
        overwrite: Replace the output of a job of the same kind with another fingerprint.

    Attributes:
        rank, world_size: This process's number, and how many there are.
        shards: All of the job, those of other ranks too, in the order of their numbers.

    Raises:
        FingerprintError: if the folder holds the output, finished or not, of another fingerprint, and `overwrite` is
            not set.
        OutputError: if the folder holds anything else.
        ManifestError: if the folder's manifest is damaged.
    """

    def __init__(
        self, folder: StrPath, kind: str, fingerprint: Mapping[str, Any], overwrite: bool = False
    ) -> None:
        self.folder = Path(folder)
        self.kind = kind
        self.fingerprint: dict[str, Any] = to_jsonable({"kind": kind, **fingerprint})
        self.rank, self.world_size = rank_and_world_size()
        self.shards: list[Shard[Inputs]] = []
        shard_name = rf"{re.escape(kind)}-\d{{5,}}\.arrow"
        self._names = re.compile(rf"{shard_name}|\.{shard_name}{re.escape(TEMPORARY)}")
        self._check_folder(overwrite)

    def add_shard(self, inputs: Inputs, fingerprint: Any) -> None:
        """Add the next shard.

        Args:
            inputs: What it is made from.
            fingerprint: Any JSON-able value that is another one when the shard's content would be.
        """
        path = shard_path(self.folder, self.kind, len(self.shards))
        self.shards.append(Shard(path, inputs, compute_fingerprint(fingerprint)))

    def is_finished(self) -> bool:
        """Whether the manifest is there, and all of the shards, and none was made from other inputs."""
        if not self._is_claimed() or not (self.folder / MANIFEST).is_file():
            return False
        manifest = read_manifest(self.folder, self.kind)
        entries = [(entry["file"], entry.get("fingerprint")) for entry in manifest["shards"]]
        return (
            manifest.get("fingerprint") == self.fingerprint
            and entries == [(shard.path.name, shard.fingerprint) for shard in self.shards]
            and all(shard.metadata() is not None for shard in self.shards)
        )

    def claim(self) -> list[Shard[Inputs]]:
        """Begin or continue the job; other ranks wait for rank 0 here.

        Returns:
            The shards that this rank has to make: every n-th, but those that are there.

        Raises:
            OutputError: if another job is writing to the folder, or the folder has become another one's meanwhile.
        """
        if self.rank == 0:
            # Another job may have claimed the folder while this one looked for its inputs.
            check_folder(self.folder, self.kind)
            lock_folder(self.folder)
            if not self._is_claimed():
                write_fingerprint(self.folder / FINGERPRINT, self.fingerprint)
            (self.folder / MANIFEST).unlink(missing_ok=True)
        # A lock of another job is one that was killed, or rank 0 is about to be refused.
        while not (self._is_claimed() and job_of_lock(self.folder) in (None, current_job())):
            time.sleep(POLL_SECONDS)
        return [shard for shard in self.shards[self.rank :: self.world_size] if not shard.is_complete()]

    def wait(self) -> list[dict[str, Any]]:
        """Wait until all ranks have made their shards; if one of them fails, torchrun ends this process.

        Returns:
            The metadata of each shard.

        Raises:
            OutputError: if the folder, or a shard that this rank has made, was deleted or replaced meanwhile.
        """
        results: dict[Path, dict[str, Any]] = {}
        next_line = time.monotonic() + LOG_SECONDS
        while True:
            # Look for those that have come, and at whether those of this rank are still there.
            names = {path.name for path in self._files()}
            for shard in self.shards:
                if shard.path not in results and shard.path.name in names and (metadata := shard.metadata()):
                    results[shard.path] = metadata
            missing_shards = [shard for shard in self.shards if shard.path not in results]
            if not missing_shards:
                return [results[shard.path] for shard in self.shards]
            self._check_progress(names, missing_shards)
            if time.monotonic() > next_line:
                log.info(
                    "%s: waiting for %d shards of other ranks, such as %s",
                    *(self.folder, len(missing_shards), missing_shards[0].path.name),
                )
                next_line += LOG_SECONDS
            time.sleep(POLL_SECONDS)

    def _check_progress(self, names: set[str], missing_shards: Sequence[Shard[Inputs]]) -> None:
        """Refuse to wait for what does not come any more.

        Args:
            names: Of the shards in the folder.
            missing_shards: Those of all ranks that are not there, or are no shards of this job.

        Raises:
            OutputError: if the folder is another job's now, or none at all, or has lost a shard of this rank.
        """
        if not self._is_claimed():
            raise OutputError(
                f"{self.folder}: was deleted or replaced while the job was running; start it again"
            )
        missing_paths = {shard.path for shard in missing_shards}
        for shard in self.shards[self.rank :: self.world_size]:
            if shard.path.name not in names or shard.path in missing_paths:
                fault = "damaged" if shard.path.name in names else "deleted"
                raise OutputError(f"{shard.path}: was {fault} after it was made; start the job again")

    def publish(self, counts: Sequence[str], fields: Mapping[str, Any]) -> dict[str, int]:
        """Wait for all shards, remove those that earlier jobs have left, and write the manifest; for rank 0.

        Args:
            counts: Names of numbers in the shards' metadata; the manifest has them of each shard, and their sums.
            fields: What else is in the manifest.

        Returns:
            The sums, by name.
        """
        results = self.wait()
        paths = {shard.path for shard in self.shards}
        for path in self._files():
            if path not in paths:
                path.unlink()
        totals = dict.fromkeys(counts, 0)
        entries: list[dict[str, Any]] = []
        for shard, metadata in zip(self.shards, results, strict=True):
            numbers = {name: metadata[name] for name in counts}
            totals = {name: totals[name] + numbers[name] for name in counts}
            hashes = {"fingerprint": shard.fingerprint, "sha256": sha256(shard.path)}
            entries.append({"file": shard.path.name, **numbers, **hashes})
        content = {**totals, **fields, "fingerprint": self.fingerprint, "shards": entries}
        write_manifest(self.folder, self.kind, content)
        unlock_folder(self.folder)
        return totals

    def _check_folder(self, overwrite: bool) -> None:
        """Refuse a folder whose content this job must not replace."""
        # Of another kind of job nothing is replaced, whatever the options say.
        check_folder(self.folder, self.kind)
        if (self.folder / MANIFEST).is_file():
            read_manifest(self.folder, self.kind)
        if overwrite:
            return
        has_fingerprint = check_fingerprint(self.folder / FINGERPRINT, self.fingerprint)
        # Only rank 0 asks where shards come from: until it has claimed the folder, no rank of this job writes one.
        if not has_fingerprint and self.rank == 0 and self._files():
            raise FingerprintError(
                f"{self.folder}: has {self.kind}, but no {FINGERPRINT} that says what they were made from; choose "
                "another folder, or --overwrite to replace them"
            )

    def _is_claimed(self) -> bool:
        """Whether the folder's fingerprint is that of this job."""
        return self._read_fingerprint() == self.fingerprint

    def _read_fingerprint(self) -> dict[str, Any] | None:
        """The fingerprint of the job that has claimed the folder; None if there is none that can be read."""
        try:
            fingerprint = json.loads((self.folder / FINGERPRINT).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return fingerprint if isinstance(fingerprint, dict) else None

    def _files(self) -> list[Path]:
        """The files in the folder that are named as shards of this kind, incomplete ones too."""
        names = self.folder.iterdir() if self.folder.is_dir() else ()
        return [path for path in names if self._names.fullmatch(path.name)]
