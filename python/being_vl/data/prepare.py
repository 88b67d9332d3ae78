"""`being-vl prepare`: records, grids and a model's vocabulary → a folder of tokenised records."""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from being_vl.data.options import PrepareOptions
from being_vl.data.records import Records
from being_vl.data.sequences import DROPPED, TRUNCATED, Fault, SequenceBuilder
from being_vl.data.store import shard_path, write_shard
from being_vl.errors import ManifestError, ModelError, RecordError
from being_vl.files import (
    MANIFEST,
    read_manifest,
    sha256,
    to_jsonable,
    write_aside,
    write_json,
    write_manifest,
)
from being_vl.fingerprints import check_fingerprint, compute_fingerprint
from being_vl.layout import LAYOUT_FILE, VocabularyLayout
from being_vl.quantize.loading import end_with_parent
from being_vl.shards.grids import GridStore, finished_shard, rank_and_count
from being_vl.tokenizer import VisualBPE

log = logging.getLogger(__name__)
FAULTS = "faults.jsonl"


def prepare(options: PrepareOptions) -> None:
    """Tokenise all records, as `tokenise` does, and report what is wrong with them.

    Raises:
        RecordError: if records are bad, unless `lenient`, after all have been read; or none is left.
        ManifestError, ConfigError, ModelError, QuantizerError: as `tokenise`.
    """
    tokenise(options, load_builder(options))
    if rank_and_count()[0] == 0:
        check_faults(options.out, options.lenient)


def tokenise(options: PrepareOptions, builder: SequenceBuilder) -> None:
    """Tokenise all records that can be, and list the others in the folder; `builder` is what `load_builder` made.

    Each Arrow file appears when it is whole and the manifest last; the same job run again takes over the files whose
    records have not changed. Under torchrun (RANK and WORLD_SIZE in the environment) each process makes every n-th
    file, and the first one the manifest.

    Raises:
        RecordError: if a file of records cannot be read at all.
        ManifestError: if `out` holds sequences of another vocabulary, or made with other options.
        ConfigError, ModelError, QuantizerError: if the inputs do not fit together.
    """
    rank, ranks = rank_and_count()
    names = ("default_category", "categories", "images_in_front")
    reading = {name: getattr(options.sequences, name) for name in names}
    records = Records(options.records, **reading)
    recipe = builder.fingerprint_fields() | reading
    check_fingerprint(options.out / "recipe.json", recipe)
    made_from = [recipe, sha256(options.grids / MANIFEST) if options.grids else None]
    starts = range(0, len(records), options.shard_size)
    shards = [
        Shard(options.out, n, records, range(start, min(start + options.shard_size, len(records))), made_from)
        for n, start in enumerate(starts)
    ]
    manifest = options.out / MANIFEST
    done = len(read_manifest(options.out, "sequences")["shards"]) if manifest.is_file() else 0
    if done == len(shards) and all(shard.finished for shard in shards):
        return
    if rank == 0:
        write_json(options.out / "recipe.json", recipe)
        manifest.unlink(missing_ok=True)
    _make_all([shard for shard in shards[rank::ranks] if shard.finished is None], builder, options.workers)
    if rank > 0:
        return
    for shard in shards:
        while shard.finished is None:  # another process is at it; if it fails, torchrun ends this one
            time.sleep(0.2)
    for stale in set(options.out.glob("sequences-*.arrow")) - {shard.path for shard in shards}:
        stale.unlink()
    _write_manifest(options, recipe, shards)


def load_builder(options: PrepareOptions) -> SequenceBuilder:
    """What turns records into sequences for a model, all checked to belong together.

    Raises:
        ModelError: if the model's folder is none, or its tokenizer cannot be used.
        QuantizerError: if the grids are another quantizer's than the model's.
    """
    from transformers import AutoConfig, AutoTokenizer

    if not (options.model / "config.json").is_file():
        raise ModelError(f"{options.model}: no config.json; expected the folder of a causal LM")
    expanded = (options.model / LAYOUT_FILE).is_file()
    config = AutoConfig.from_pretrained(options.model).get_text_config()
    sequences = options.sequences
    max_length = min(sequences.max_length, getattr(config, "max_position_embeddings", sequences.max_length))
    if max_length < sequences.max_length and rank_and_count()[0] == 0:
        log.info("max_length %d is beyond the model's context, so it is %d", sequences.max_length, max_length)
    return SequenceBuilder(
        AutoTokenizer.from_pretrained(options.model),
        layout=VocabularyLayout.load(options.model) if expanded else None,
        bpe=VisualBPE.load(options.model / "visual_vocabulary.json") if expanded else None,
        grids=GridStore.open(options.grids) if options.grids else None,
        max_length=max_length,
        too_long=sequences.too_long,
        loss=sequences.loss,
    )


class Shard:
    """One Arrow file and the records in it.

    Args:
        folder: Where it is.
        number: Its number.
        records: All records.
        part: The numbers of those in it.
        made_from: What they are made into sequences by.
    """

    def __init__(
        self, folder: Path, number: int, records: Records, part: range, made_from: Sequence[Any]
    ) -> None:
        self.path = shard_path(folder, number)
        self.part = part
        self._records = records
        self._made_from = made_from
        self._metadata: dict[str, Any] | None = None

    @cached_property
    def job(self) -> str:
        """What the file's content follows from, the records by their files' names, sizes and times of change."""
        places = []
        for file, start, stop in self._records.parts(self.part.start, self.part.stop):
            status = self._records.paths[file].stat()
            places.append([self._records.paths[file], status.st_size, status.st_mtime_ns, start, stop])
        return compute_fingerprint([self._made_from, places])

    @property
    def finished(self) -> dict[str, Any] | None:
        """Metadata of the file, if it is there and of this job."""
        if self._metadata is None:
            self._metadata = finished_shard(self.path, self.job)
        return self._metadata

    def make(self, builder: SequenceBuilder) -> None:
        """Read the records, and write the file."""
        faults: list[Fault] = []
        good = []
        for record in self._records.read(self.part.start, self.part.stop):
            if isinstance(record, RecordError):
                faults.append(Fault(record.kind, str(record)))
            else:
                good.append(record)
        examples = builder.build(good, faults)
        write_shard(self.path, examples, {"job": self.job, "records": len(self.part), "faults": faults})


def _make_all(shards: list[Shard], builder: SequenceBuilder, workers: int) -> None:
    made = DataLoader(
        _Making(shards, builder),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=1 if workers else None,
        multiprocessing_context="fork" if workers else None,  # they share the places of the records
        worker_init_fn=_alone if workers else None,
    )
    total = sum(len(shard.part) for shard in shards)
    done, started = 0, time.perf_counter()
    with tqdm(total=total, unit="record", desc="prepare", disable=None) as bar:
        for count in made:
            done += count
            bar.update(count)
            log.info(
                "prepared %d of %d records; %.0f a second",
                done,
                total,
                done / (time.perf_counter() - started),
            )


@dataclass
class _Making(Dataset[int]):
    """Asking for shard n makes it; its number of records comes back."""

    shards: Sequence[Shard]
    builder: SequenceBuilder

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> int:
        if get_worker_info() is not None:
            self.builder.num_threads = 1
        self.shards[index].make(self.builder)
        return len(self.shards[index].part)


def _alone(worker: int) -> None:
    """A worker has one core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with_parent(worker)


def _write_manifest(options: PrepareOptions, recipe: dict[str, Any], shards: Sequence[Shard]) -> None:
    """List all faults in a file, count them and everything else in the manifest."""
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    entries = []
    with write_aside(options.out / FAULTS) as aside, aside.open("w", encoding="utf-8") as file:
        for shard in shards:
            assert shard.finished is not None
            for kind, text in shard.finished["faults"]:
                kinds[kind] += 1
                file.write(json.dumps({"kind": kind, "fault": text}, ensure_ascii=False) + "\n")
            entry = {
                name: shard.finished[name] for name in ("records", "examples", "tokens", "trained_tokens")
            }
            counts.update(entry)
            entries.append({"file": shard.path.name, **entry, "sha256": sha256(shard.path)})
    grids = options.grids
    files = {"source": to_jsonable(options.records), "grids": str(grids.absolute()) if grids else None}
    files["grids_sha256"] = sha256(grids / MANIFEST) if grids else None
    write_manifest(
        options.out,
        "sequences",
        {**files, **counts, "faults": dict(kinds.most_common()), "recipe": recipe, "shards": entries},
    )


def find_grids(folder: Path, given: Path | None) -> Path | None:
    """The grids that sequences were made from: where they are given, or where they were; None if they are gone.

    Raises:
        ManifestError: if those that are given are others.
    """
    manifest = read_manifest(folder, "sequences")
    was = manifest["grids"] and Path(manifest["grids"])
    found = given or (was if was and (was / MANIFEST).is_file() else None)
    if found and sha256(found / MANIFEST) != manifest["grids_sha256"]:
        raise ManifestError(f"{folder}: was made from other grids than are in {found} now; prepare it again")
    return found


def check_faults(folder: Path, lenient: bool) -> None:
    """Log what a preparation has left out or cut; see whether that is to be borne.

    Raises:
        RecordError: if some are bad, unless `lenient`; or none is left.
    """
    manifest = read_manifest(folder, "sequences")
    if manifest["faults"] and rank_and_count()[0] == 0:
        log.info("\n".join(describe_faults(folder)))
    kinds, records = manifest["faults"], manifest["records"]
    bad = records - manifest["examples"] - kinds.get(DROPPED, 0)
    if (not bad or lenient) and manifest["examples"]:
        return
    what, remedy = f"{bad} of {records} records are bad", "mend them, or set lenient"
    if not manifest["examples"]:
        what, remedy = f"none of {records} records is left", "mend them"
    kinds = {kind: n for kind, n in kinds.items() if kind not in (DROPPED, TRUNCATED)} or kinds
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    first = next(fault["fault"] for fault in _read_faults(folder) if fault["kind"] in kinds)
    raise RecordError(f"{what} ({counted}; see {folder / FAULTS}); first: {first}; {remedy}")


def describe_faults(folder: Path) -> Iterator[str]:
    """Lines that count what a preparation has left out or cut, by kind, with the first few of each."""
    manifest = read_manifest(folder, "sequences")
    first: dict[str, list[str]] = {kind: [] for kind in manifest["faults"]}
    for fault in _read_faults(folder):
        if len(first[fault["kind"]]) < 3:
            first[fault["kind"]].append(fault["fault"])
    for kind, texts in first.items():
        yield f"{kind}: {manifest['faults'][kind]:,} of {manifest['records']:,} records"
        yield from (f"  {text}" for text in texts)
    if first:
        yield f"all of them: {folder / FAULTS}"


def _read_faults(folder: Path) -> Iterator[dict[str, str]]:
    with (folder / FAULTS).open(encoding="utf-8") as file:
        yield from map(json.loads, file)
