"""The shards of a finished folder, compared with the checksums in its manifest before their content is used."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from being_vl.errors import ManifestError
from being_vl.files import MANIFEST, sha256
from being_vl.options import StrPath

log = logging.getLogger(__name__)

MAX_THREADS = 8
LOG_SECONDS = 1.0
"""Checks that take longer than this are told."""


@dataclass(frozen=True)
class ShardEntry:
    """What a manifest says of a shard.

    Args:
        path: The file.
        num_rows: How many rows it has.
        sha256: Of the file.
    """

    path: Path
    num_rows: int
    sha256: str


def read_entries(folder: StrPath, manifest: Mapping[str, Any], count: str) -> list[ShardEntry]:
    """The shards that a manifest lists.

    Args:
        folder: The manifest's.
        manifest: Its content.
        count: Name of the number of a shard's rows.

    Raises:
        ManifestError: if the list is damaged.
    """
    folder = Path(folder)
    try:
        entries = [(entry["file"], entry[count], entry["sha256"]) for entry in manifest["shards"]]
    except (KeyError, TypeError) as error:
        raise ManifestError(f"{folder / MANIFEST}: its list of shards is damaged ({error!r:.80})") from None
    for name, num_rows, checksum in entries:
        is_plain = isinstance(name, str) and Path(name).name == name
        if not (is_plain and isinstance(num_rows, int) and isinstance(checksum, str)):
            raise ManifestError(
                f"{folder / MANIFEST}: its list of shards is damaged; expected a file's name, {count} and sha256, "
                f"found {name!r:.80}, {num_rows!r:.80}, {checksum!r:.80}"
            )
    return [ShardEntry(folder / name, num_rows, checksum) for name, num_rows, checksum in entries]


def verify_shards(entries: Sequence[ShardEntry], job: str, rank: int = 0, world_size: int = 1) -> None:
    """Make sure that shards are the files that their job wrote; several are read at a time.

    Args:
        entries: All shards of a folder.
        job: Name of the command that makes them, for errors.
        rank, world_size: Ranks that verify together: each takes every n-th shard. No rank may use a shard before all
            have come back from here.

    Raises:
        ManifestError: if one is missing, or has other bytes than when it was written.
    """
    entries = entries[rank::world_size]
    start = time.perf_counter()
    # Hashing leaves Python to other threads.
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(_verify, entry, job) for entry in entries]
        try:
            num_bytes = sum(future.result() for future in futures)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    seconds = time.perf_counter() - start
    if seconds > LOG_SECONDS:
        folder, part = entries[0].path.parent, f"; rank {rank}" if world_size > 1 else ""
        log.info(
            "%s: %d files are as they were written (%.1f GB in %.1f s%s)",
            folder,
            len(entries),
            num_bytes / 1e9,
            seconds,
            part,
        )


def _verify(entry: ShardEntry, job: str) -> int:
    """Compare one shard with its checksum; returns its size in bytes."""
    remedy = f"restore it, or delete it and run `being-vl {job}` again, which makes this file anew"
    try:
        checksum = sha256(entry.path)
        size = entry.path.stat().st_size
    except OSError as error:
        raise ManifestError(f"{entry.path}: cannot be read ({error.strerror or error}); {remedy}") from None
    if checksum != entry.sha256:
        raise ManifestError(
            f"{entry.path}: was changed after it had been written: its SHA-256 is {checksum[:16]}, the manifest says "
            f"{entry.sha256[:16]:.16}; {remedy}"
        )
    return size
