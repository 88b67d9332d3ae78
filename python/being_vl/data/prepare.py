"""`being-vl prepare`: records, grids and a model's vocabulary → a folder of sequences."""

import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, get_worker_info

from being_vl.account import LEFT_OUT, Account
from being_vl.data.options import PrepareOptions
from being_vl.data.records import Records
from being_vl.data.sequences import DROPPED_RECORD, TRUNCATED_RECORD, Fault, SequenceBuilder
from being_vl.data.store import KIND, sequence_columns
from being_vl.errors import BeingVLError, FingerprintError, RecordError
from being_vl.files import MANIFEST, file_version, read_manifest, sha256, to_jsonable, write_aside
from being_vl.options import StrPath, fixed_options
from being_vl.outputs import check_folder, free_locks
from being_vl.progress import progress_bar, show_log_lines
from being_vl.shards.job import Shard, ShardedJob
from being_vl.shards.ranks import end_with_parent, rank_and_world_size

log = logging.getLogger(__name__)

_PLACE = re.compile(r"(.*?: record \d+(?: \(.*?\))?): (.*)", re.DOTALL)

RecordShard = Shard[range]


@show_log_lines()
@free_locks()
def prepare(options: PrepareOptions) -> None:
    """Tokenise all records, as `tokenise` does, and report their faults.

    Raises:
        RecordError: if records have faults, unless `lenient`, after all have been read; or no record is left.
        FingerprintError, ConfigError, ModelError, QuantizerError, OutputError: as `tokenise`.
    """
    inputs = [options.model, *options.grids, *(file.path for file in options.records)]
    check_folder(options.out, KIND, inputs=inputs)
    sequences = options.sequences
    builder = SequenceBuilder.from_model(
        options.model, options.grids, sequences.max_length, sequences.too_long, sequences.loss
    )
    tokenise(options, builder)
    if rank_and_world_size()[0] == 0:
        check_faults(options.out, options.lenient)


def tokenise(options: PrepareOptions, builder: SequenceBuilder, inputs_may_move: bool = False) -> None:
    """Tokenise all records without faults, and list the others in the folder.

    The same job run again goes on where it was, and makes those shards again whose records have changed. Under torchrun
    (RANK and WORLD_SIZE in the environment) the ranks share the shards.

    Args:
        options: Of the job.
        builder: That of the model.
        inputs_may_move: Let the files of records, the grids and `shard_size` differ from those of the output that is
            there, and make again what follows from them: for a training, whose own fingerprint has their content.

    Raises:
        RecordError: if a file of records cannot be read at all.
        FingerprintError: if `out` holds sequences of another vocabulary, other options or other files of records, and
            `overwrite` is not set.
        OutputError: if `out` holds anything else, or another process is writing there.
        ConfigError, ModelError, QuantizerError: if the inputs do not fit together.
    """
    # What decides all sequences, and where the inputs lie; the inputs' content decides each shard.
    sequences = options.sequences
    records = Records(
        options.records, sequences.default_category, sequences.categories, sequences.images_in_front
    )
    sequence_fields = fixed_options(sequences) | builder.fingerprint_fields()
    grids = sorted({folder.absolute() for folder in options.grids})
    input_fields = {
        "records": [
            [file.path.absolute(), file.category] if file.category else file.path.absolute()
            for file in options.records
        ],
        "grids": grids,
        "shard_size": options.shard_size,
    }
    fingerprint = sequence_fields if inputs_may_move else sequence_fields | input_fields
    job = ShardedJob[range](options.out, KIND, fingerprint, options.overwrite)
    grids_sha256 = _hash_grids(grids)
    for start in range(0, len(records), options.shard_size):
        part = range(start, min(start + options.shard_size, len(records)))
        job.add_shard(part, [sequence_fields, grids_sha256, _versions(records, part)])
    if job.is_finished():
        return

    # Make this rank's shards, and on the first rank the manifest of all.
    _make_shards(job.claim(), records, builder, options.workers)
    if job.rank > 0:
        return
    results = job.wait()
    faults = [Fault(*fault) for metadata in results for fault in metadata["faults"]]
    _write_faults(options.out, faults)
    kinds = Counter(fault.kind for fault in faults)
    left_out = Counter({kind: count for kind, count in kinds.items() if kind != TRUNCATED_RECORD})
    account = Account("records", sum(metadata["sequences"] for metadata in results), left_out)
    fields = {
        "grids": grids,
        "grids_sha256": grids_sha256,
        "faults": dict(kinds.most_common()),
        "account": account.to_json(),
    }
    job.publish(["records", "sequences", "tokens", "label_tokens"], to_jsonable(fields))


def _versions(records: Records, part: range) -> list[Any]:
    """The files that a shard's records are in, as they are now, and which of their records these are."""
    return [
        [str(records.paths[file]), file_version(records.paths[file]), start, stop, records.category_of(file)]
        for file, start, stop in records.parts(part.start, part.stop)
    ]


def _make_shards(
    shards: Sequence[RecordShard], records: Records, builder: SequenceBuilder, workers: int
) -> None:
    """Make shards, each in one of `workers` processes, or in this one."""
    counts = DataLoader(
        _ShardMaker(shards, records, builder),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=1 if workers else None,
        multiprocessing_context="fork" if workers else None,  # they share where the records are
        worker_init_fn=_start_worker if workers else None,
    )
    total = sum(len(shard.inputs) for shard in shards)
    num_records, num_sequences, start = 0, 0, time.perf_counter()
    with progress_bar(total, "record", "prepare") as bar:
        for numbers in counts:
            if isinstance(numbers, Exception):
                raise numbers
            count, sequence_count = numbers
            num_records += count
            num_sequences += sequence_count
            bar.update(count)
            speed = num_records / (time.perf_counter() - start)
            text = "read %d of %d records, left out %d; %.0f a second"
            log.info(text, num_records, total, num_records - num_sequences, speed)


@dataclass
class _ShardMaker(Dataset[tuple[int, int] | Exception]):
    """A data set that makes shard n when its item n is read: the shard's numbers of records and of sequences.

    An item is an error if the shard cannot be made: raised in a worker, it would come with the worker's traceback.
    """

    shards: Sequence[RecordShard]
    records: Records
    builder: SequenceBuilder

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> tuple[int, int] | Exception:
        if get_worker_info() is not None:
            self.builder.num_threads = 1
        try:
            return self._make(self.shards[index])
        except (BeingVLError, OSError) as error:
            return error

    def _make(self, shard: RecordShard) -> tuple[int, int]:
        faults: list[Fault] = []
        records = []
        for record in self.records.read(shard.inputs.start, shard.inputs.stop):
            if isinstance(record, RecordError):
                faults.append(Fault(record.kind, str(record)))
            else:
                records.append(record)
        columns, counts = sequence_columns(self.builder.build(records, faults))
        shard.write(columns, {"records": len(shard.inputs), **counts, "faults": faults})
        return len(shard.inputs), counts["sequences"]


def _start_worker(worker: int) -> None:
    """Leave a worker one core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with_parent(worker)


def find_grids(folder: StrPath, grids: Sequence[StrPath] = ()) -> list[Path]:
    """The grids that sequences were made from.

    Args:
        folder: Of the sequences.
        grids: The folders of grids, if they are others than when they were made; in any order.

    Returns:
        The folders; none if the sequences have no images, or one of them is gone.

    Raises:
        FingerprintError: if there are other grids in them than the sequences were made from.
    """
    manifest = read_manifest(folder, KIND)
    folders = [Path(path) for path in grids or manifest["grids"]]
    if not grids and not all((path / MANIFEST).is_file() for path in folders):
        return []
    if _hash_grids(folders) != manifest["grids_sha256"]:
        names = " and ".join(map(str, folders)) or "none"
        raise FingerprintError(
            f"{folder}: was made from other grids than are in {names} now; prepare it again"
        )
    return folders


def _hash_grids(folders: Sequence[Path]) -> list[str]:
    """Of each folder of grids, whatever their order."""
    return sorted(sha256(folder / MANIFEST) for folder in folders)


def check_faults(folder: StrPath, lenient: bool) -> None:
    """Log which records a preparation has left out or cut, and as the last line how many; raise if that is an error.

    Raises:
        RecordError: if records have faults, unless `lenient`; or no record is left.
    """
    manifest = read_manifest(folder, KIND)
    if rank_and_world_size()[0] == 0:
        if manifest["faults"]:
            log.info("\n".join(describe_faults(folder)))
        log.info("%s", Account.from_json(manifest["account"]).describe())
    kinds, num_records = manifest["faults"], manifest["records"]
    num_faults = num_records - manifest["sequences"] - kinds.get(DROPPED_RECORD, 0)
    if (not num_faults or lenient) and manifest["sequences"]:
        return
    summary, remedy = f"{num_faults} of {num_records} records have faults", "mend them, or set lenient"
    if not manifest["sequences"]:
        summary, remedy = f"none of {num_records} records is left", "mend them"
    kinds = {kind: n for kind, n in kinds.items() if kind not in (DROPPED_RECORD, TRUNCATED_RECORD)} or kinds
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    first_fault = next(fault.text for fault in _read_faults(folder) if fault.kind in kinds)
    raise RecordError(f"{summary} ({counts}; see {Path(folder) / LEFT_OUT}); first: {first_fault}; {remedy}")


def describe_faults(folder: StrPath) -> Iterator[str]:
    """Lines that count what a preparation has left out or cut, by kind, with the first few of each."""
    manifest = read_manifest(folder, KIND)
    texts_of_kinds: dict[str, list[str]] = {kind: [] for kind in manifest["faults"]}
    for fault in _read_faults(folder):
        if len(texts_of_kinds[fault.kind]) < 3:
            texts_of_kinds[fault.kind].append(fault.text)
    for kind, texts in texts_of_kinds.items():
        yield f"{kind}: {manifest['faults'][kind]:,} of {manifest['records']:,} records"
        yield from (f"  {text}" for text in texts)
    if texts_of_kinds:
        yield f"all of them: {Path(folder) / LEFT_OUT}"


def _write_faults(folder: Path, faults: Sequence[Fault]) -> None:
    with write_aside(folder / LEFT_OUT) as temporary_path, temporary_path.open("w", encoding="utf-8") as file:
        for kind, text in faults:
            name, reason = match.groups() if (match := _PLACE.fullmatch(text)) else ("", text)
            line = json.dumps({"name": name, "kind": kind, "reason": reason}, ensure_ascii=False)
            file.write(line + "\n")


def _read_faults(folder: StrPath) -> Iterator[Fault]:
    with (Path(folder) / LEFT_OUT).open(encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            yield Fault(
                entry["kind"], f"{entry['name']}: {entry['reason']}" if entry["name"] else entry["reason"]
            )
