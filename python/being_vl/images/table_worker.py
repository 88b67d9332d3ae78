"""The process that reads files of others in place of its parent; started as a script by `table_process`.

A damaged Parquet or Arrow file can crash its reader, take all memory, or never end. Here it ends this process alone.
It imports pyarrow and nothing of being-vl, to start fast.

A request is a line of JSON that comes with two descriptors: that of the file, and that of memory for the answer. The
answer is a line of JSON, with `error` if the file cannot be read.
"""

import json
import os
import resource
import signal
import socket
import sys
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FILES_IN_MEMORY = 4

_files: OrderedDict[str, pq.ParquetFile] = OrderedDict()


def main() -> None:
    """Answer requests until the parent is gone."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.sendall(b"\n")
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 2)
        while message and not message.endswith(b"\n"):
            part = connection.recv(1 << 16)
            message = message + part if part else b""
        if not message:
            return
        try:
            answer = _answer(json.loads(message), *descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        connection.sendall(json.dumps(answer).encode() + b"\n")


def _answer(request: dict[str, Any], source: int, target: int) -> dict[str, Any]:
    """Carry out a request within its limits of memory and of processor time."""
    _limit_memory(request["bytes"])
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # its signal ends the process
    try:
        if request["format"] == "parquet":
            return _read_parquet(request, source, target)
        if request["group"] is None:
            return _check_arrow(source)
        return _copy_batch(request, source, target)
    except (MemoryError, pa.ArrowMemoryError):
        return {"error": "memory"}
    except Exception as error:  # whatever a damaged file leads to
        return {"error": str(error) or type(error).__name__}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory(size: int) -> None:
    """Let the process take so many bytes of memory beside what it has."""
    try:
        size += int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (OSError, ValueError):
        return  # not on this system


def _read_parquet(request: dict[str, Any], source: int, target: int) -> dict[str, Any]:
    """Write the file's schema, or columns of a row group, as an Arrow stream."""
    file = _parquet_file(request["name"], source)
    if request["group"] is None:
        schema, batches = file.schema_arrow, []
        validate_schema(schema)
    else:
        table = file.read_row_group(request["group"], columns=request["columns"])
        schema, batches = table.schema, table.to_batches()
    for batch in batches:
        validate(batch)
    with pa.OSFile(f"/dev/fd/{target}", "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    if request["group"] is not None:
        return {}
    metadata = file.metadata
    groups = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    if min(groups, default=0) < 0:
        raise ValueError("a row group of less than no rows")
    leaves = [metadata.schema.column(n).path for n in range(len(metadata.schema))]
    null_counts = {
        leaf: [_null_count(metadata.row_group(n).column(number).statistics) for n in range(len(groups))]
        for number, leaf in enumerate(leaves)
        if leaf.endswith(".bytes")
    }
    return {"groups": groups, "leaves": leaves, "null_counts": null_counts}


def _null_count(statistics: Any) -> int | None:
    return statistics.null_count if statistics and statistics.has_null_count else None


def _parquet_file(name: str, source: int) -> pq.ParquetFile:
    """The open file of that name, which stands for its version too."""
    if name not in _files:
        _files[name] = pq.ParquetFile(f"/dev/fd/{source}")
        if len(_files) > FILES_IN_MEMORY:
            _files.popitem(last=False)
    _files.move_to_end(name)
    return _files[name]


def _check_arrow(source: int) -> dict[str, Any]:
    """Check all record batches of an Arrow file, of either format."""
    schema, batches = _open_arrow(source)
    validate_schema(schema)
    for batch in batches:
        validate(batch)
    return {}


def _copy_batch(request: dict[str, Any], source: int, target: int) -> dict[str, Any]:
    """Write columns of a record batch as an Arrow stream."""
    _, batches = _open_arrow(source)
    batch = next(islice(batches, request["group"], None)).select(request["columns"])
    validate(batch)
    with pa.OSFile(f"/dev/fd/{target}", "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    # What lay outside of the file may have changed meanwhile.
    with pa.memory_map(f"/dev/fd/{target}") as copy:
        for batch in pa.ipc.open_stream(copy):
            validate(batch)
    return {}


def _open_arrow(source: int) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Schema and record batches of an Arrow file of either format."""
    file_map = pa.memory_map(f"/dev/fd/{source}")
    if file_map.read(6) == b"ARROW1":
        file = pa.ipc.open_file(file_map)
        return file.schema, (file.get_batch(number) for number in range(file.num_record_batches))
    file_map.seek(0)
    stream = pa.ipc.open_stream(file_map)
    return stream.schema, iter(stream)


def validate_schema(schema: pa.Schema) -> None:
    """Raise if names or types cannot be read."""
    for field in schema:
        str(field)
        without_texts(field.type)


def validate(batch: pa.RecordBatch) -> None:
    """Raise if reading a value could leave the batch's memory; a text that is not UTF-8 is the record's fault alone."""
    # This holds buffers against their sizes, which are lost in the next step.
    batch.validate()
    schema = pa.schema([(field.name, without_texts(field.type)) for field in batch.schema])
    _, array = batch.__arrow_c_array__()
    pa.RecordBatch._import_from_c_capsule(schema.__arrow_c_schema__(), array).validate(full=True)


def without_texts(kind: pa.DataType) -> pa.DataType:
    """A type of the same layout, with bytes in place of texts, and without extensions."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return without_texts(kind.storage_type)
    for is_kind, bytes_kind in (
        (types.is_string, pa.binary),
        (types.is_large_string, pa.large_binary),
        (types.is_string_view, pa.binary_view),
    ):
        if is_kind(kind):
            return bytes_kind()
    for is_kind, new_list in (
        (types.is_list, pa.list_),
        (types.is_large_list, pa.large_list),
        (types.is_list_view, pa.list_view),
        (types.is_large_list_view, pa.large_list_view),
    ):
        if is_kind(kind):
            return new_list(_field_without_texts(kind.value_field))
    if types.is_fixed_size_list(kind):
        return pa.list_(_field_without_texts(kind.value_field), kind.list_size)
    if types.is_struct(kind):
        return pa.struct([_field_without_texts(field) for field in kind])
    if types.is_map(kind):
        return pa.map_(
            _field_without_texts(kind.key_field), _field_without_texts(kind.item_field), kind.keys_sorted
        )
    if types.is_union(kind):
        fields = [_field_without_texts(kind.field(n)) for n in range(kind.num_fields)]
        return pa.union(fields, kind.mode, kind.type_codes)
    if types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, without_texts(kind.value_type), kind.ordered)
    if types.is_run_end_encoded(kind):
        return pa.run_end_encoded(kind.run_end_type, without_texts(kind.value_type))
    return kind


def _field_without_texts(field: pa.Field) -> pa.Field:
    return pa.field(field.name, without_texts(field.type), field.nullable)


if __name__ == "__main__":
    main()
