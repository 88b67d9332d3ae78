"""The Arrow files of a job: writing one, mapping one into memory, reading its metadata."""

import hashlib
import json
import mmap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from being_vl.errors import ManifestError
from being_vl.files import write_aside

METADATA_KEY = b"being_vl"
"""Where the schema of a shard keeps its metadata, as JSON."""

_CHECKSUM_KEY = b"sha256"
_NO_CHECKSUM = b"sha256 of all but these signs".ljust(64, b"-")
"""Stands in a file's schema, and in its copy at the end, until the checksum of all other bytes takes its place."""

_READ_ERRORS = (OSError, pa.ArrowException, KeyError, TypeError, ValueError)
"""What reading raises on files that are no shards."""


def shard_path(folder: Path, kind: str, number: int) -> Path:
    """Path of a job's shard of that number; `kind` is that of the folder's manifest."""
    return folder / f"{kind}-{number:05d}.arrow"


def write_table(path: Path, columns: Mapping[str, pa.Array], metadata: Mapping[str, Any]) -> None:
    """Write columns and a checksum as one Arrow IPC file of one record batch; it appears only when complete."""
    schema_metadata = {METADATA_KEY: json.dumps(dict(metadata)).encode(), _CHECKSUM_KEY: _NO_CHECKSUM}
    batch = pa.record_batch(dict(columns)).replace_schema_metadata(schema_metadata)
    # A folder that was deleted meanwhile is not made again: it would lack what the job has written before.
    with write_aside(path, make_parents=False) as temporary_path:
        with pa.ipc.new_file(str(temporary_path), batch.schema) as writer:
            writer.write_batch(batch)
        places, checksum = _hash_around(temporary_path, _NO_CHECKSUM)
        with temporary_path.open("r+b") as file:
            for place in places:
                file.seek(place)
                file.write(checksum)


def is_intact(path: Path) -> bool:
    """Whether a file has all the bytes that `write_table` wrote; reads all of it."""
    try:
        checksum = pa.ipc.open_file(pa.memory_map(str(path))).schema.metadata[_CHECKSUM_KEY]
        return bool(_hash_around(path, checksum)[1] == checksum)
    except _READ_ERRORS:
        return False


def _hash_around(path: Path, checksum: bytes) -> tuple[tuple[int, int], bytes]:
    """Where a file's schema and the copy at its end hold a checksum, and the SHA-256 of all other bytes, in hex."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        first, last = content.find(checksum), content.rfind(checksum)
        with memoryview(content) as view:
            hasher = hashlib.sha256(view[:first])
            hasher.update(view[first + len(checksum) : last])
            hasher.update(view[last + len(checksum) :])
    return (first, last), hasher.hexdigest().encode()


def open_table(path: Path, kind: str, columns: Collection[str]) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """Map what `write_table` wrote into memory: its rows and its metadata.

    Args:
        path: The file.
        kind: What it holds, for the error.
        columns: Names of the columns that it must have.

    Raises:
        ManifestError: if it is missing, damaged or of another kind.
    """
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        batch.validate(full=True)
        metadata: dict[str, Any] = json.loads(batch.schema.metadata[METADATA_KEY])
        for name in columns:
            if name not in batch.schema.names:
                raise KeyError(f"no column {name}")
    except _READ_ERRORS as error:
        raise ManifestError(
            f"{path}: not an Arrow file of {kind} ({error}); delete it and run the job that makes it again"
        ) from None
    return batch, metadata


def read_metadata(path: Path) -> dict[str, Any] | None:
    """The metadata of a shard; None if there is no such file, or it is no complete shard."""
    try:
        schema = pa.ipc.open_file(pa.memory_map(str(path))).schema
        metadata = json.loads(schema.metadata[METADATA_KEY])
    except _READ_ERRORS:
        return None
    return metadata if isinstance(metadata, dict) else None
