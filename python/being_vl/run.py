"""The whole chain on one's own images and records: quantize, learn the vocabulary, expand, train."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from being_vl.account import Account
from being_vl.contents import MIN_AGE, FileHashes, hash_files
from being_vl.errors import FingerprintError, RecordError
from being_vl.files import MANIFEST, to_jsonable, write_json
from being_vl.fingerprints import compute_fingerprint, differences
from being_vl.images.record_files import find_record_files
from being_vl.images.sources import find_images
from being_vl.names import show_name
from being_vl.options import StrPath, fixed_options
from being_vl.outputs import check_folder, claim_folder, free_locks, read_json
from being_vl.quantizer.options import QuantizeOptions
from being_vl.quantizer.training.options import QuantizerTrainOptions
from being_vl.recipes.options import RunOptions

log = logging.getLogger(__name__)

KINDS = ("run", "demo")
"""Kinds of the fingerprints of folders that runs go on in; a demo is a run with some steps more."""
SHOWN_FAULTS = 3
"""Faults of records, or changes, that an error quotes."""
SHARDED = ("quantize",)
"""Steps that make only those parts of their output again that are gone."""


class Step(NamedTuple):
    """A step of a run.

    Args:
        name: Its name.
        function: What does it; takes the options.
        options: Its options dataclass.
        inputs: What it reads that neither its options nor the steps before it decide: what is read → name → SHA-256 or
            another JSON-able value.
        files: The files of these inputs.
        output: The file or folder that it makes; None for one that is not looked after.
        account: The folder whose manifest accounts for what the step has read; None if there is none.
    """

    name: str
    function: Callable[[Any], Any]
    options: Any
    inputs: Mapping[str, Mapping[str, Any]] = {}
    files: Sequence[Path] = ()
    output: Path | None = None
    account: Path | None = None


@free_locks()
def run(options: RunOptions) -> Path:
    """Quantize, learn the vocabulary, expand and train, up to `until`; steps that are finished are skipped.

    Args:
        options: Of the run and its steps.

    Returns:
        The folder of the trained model, or what the last step made.

    Raises:
        FingerprintError: if a step in `out` was made with other options or inputs, unless `overwrite` is set.
        OutputError: if `out` holds anything else than a run, or another process is writing there.
        ConfigError, ImageError, RecordError, ModelError, QuantizerError: if the inputs are missing or do not fit
            together; before the first step.
    """
    _check_output(options)
    check_inputs(options)
    claim_folder(options.out, *KINDS)
    steps = Steps(options.out, options.overwrite)
    finished_steps = []
    output = options.out
    for step in list_steps(options, steps.hashes):
        steps.do(step)
        finished_steps.append(step)
        output = step.output or output
    for step in finished_steps:
        if step.account and (fields := read_json(step.account / MANIFEST).get("account")):
            log.info("%s: %s", step.name, Account.from_json(fields).describe())
    if step.name == "train":
        log.info("trained model: %s", output)
        log.info("ask it: being-vl generate --model %s --image FILE --prompt TEXT", output)
    else:
        log.info("%s is as far as asked for: %s", step.name, output)
    return output


def dry_run(options: RunOptions) -> Iterator[str]:
    """Check everything as `run` does, and say what it would do; nothing is written.

    Args:
        options: Of the run and its steps.

    Returns:
        A line for each step, and the schedule of the training if the steps before it are finished.

    Raises:
        As `run` does before its first step.
    """
    from being_vl.launch.local import count_ranks

    _check_output(options)
    check_inputs(options)
    steps = Steps(options.out, options.overwrite)
    is_finished = True
    for step in list_steps(options, steps.hashes):
        if step.name == "train" and is_finished:
            from being_vl.training.engine import plan_training

            yield plan_training(step.options, options.ranks or count_ranks(options.device))
        is_finished = steps.is_finished(step)
        yield f"{step.name + ':':<12}{'finished' if is_finished else 'to do':<10}{step.output}"


def _check_output(options: RunOptions) -> None:
    """Refuse a folder that holds anything else than a run, or lies in what is read."""
    records = [file.path for file in options.records]
    inputs: list[StrPath] = [options.images, *records, options.llm, options.quantizer]
    check_folder(options.out, *KINDS, inputs=inputs)


def list_steps(options: RunOptions, hashes: FileHashes) -> Iterator[Step]:
    """The steps of a run in their order, up to `until`; what each reads is looked at when it is its turn."""
    from being_vl.launch.local import quantize_on_ranks, train_on_ranks, train_quantizer_on_ranks
    from being_vl.model.expand import expand
    from being_vl.model.weights import list_files
    from being_vl.tokenizer.train import train_vocabulary

    def train_quantizer(step: QuantizerTrainOptions) -> None:
        train_quantizer_on_ranks(step, options.ranks)

    def quantize(step: QuantizeOptions) -> None:
        quantize_on_ranks(step, options.ranks)

    def train(step: Any) -> None:
        train_on_ranks(step, options.ranks, options.device)

    def list_all() -> Iterator[Step]:
        # Images and quantizer decide the grids.
        images = _list_images(options)
        inputs = {"images": _name_hashes(images, hashes)}
        quantizer: dict[str, Any] = {}
        if options.train_quantizer:
            trainer = options.quantizer_training
            held_out_files = [file for folder in trainer.held_out_images for file in _list_files(folder)]
            held_out = {str(path): digest for path, digest in hash_files(held_out_files, hashes).items()}
            files = [*images.values(), *held_out_files]
            trainer_inputs = inputs | {"held-out images": held_out}
            yield Step("quantizer", train_quantizer, trainer, trainer_inputs, files, trainer.out)
        else:
            quantizer = {"quantizer": _describe_quantizer(options.quantizer, hashes)}
        grids = options.quantize.out
        files = [*images.values()]
        yield Step("quantize", quantize, options.quantize, inputs | quantizer, files, grids, grids)
        # The vocabulary follows from the grids alone, the expanded model from the LLM and these.
        yield Step("vocab", train_vocabulary, options.vocab, output=options.vocab.out)
        files = list_files(options.llm)
        llm = {path.name: digest for path, digest in hash_files(files, hashes).items()}
        yield Step("expand", expand, options.expand, {"llm": llm} | quantizer, files, options.expand.out)
        # The training reads the records.
        files = [file for item in options.records for file in find_record_files(item.path)]
        records: dict[str, dict[str, Any]] = {
            "records": {str(path): digest for path, digest in hash_files(files, hashes).items()},
            "category of": {str(item.path): item.category for item in options.records},
        }
        output = options.train.out / options.train.stages[-1].name
        yield Step("train", train, options.train, records, files, output, options.train.out / "prepared")

    for step in list_all():
        yield step
        if step.name == options.until:
            return


def _list_images(options: RunOptions) -> dict[str, Path]:
    """Name → file of the images that `quantize` will find, and of the tars and tables that they are in."""
    quantize = options.quantize
    findings = find_images(options.images, quantize.root, quantize.allow_outside, quantize.column)
    places = sorted({source.place for source in findings.sources})
    prefix = f"{findings.root}{os.sep}"
    return {place.removeprefix(prefix): Path(place) for place in places}


def _name_hashes(files: Mapping[str, Path], hashes: FileHashes) -> dict[str, str]:
    """Name → SHA-256."""
    digests = hash_files(files.values(), hashes)
    return {name: digests[path] for name, path in files.items()}


def _list_files(folder: Path) -> list[Path]:
    """The files that the images of a folder are in."""
    return [Path(place) for place in sorted({source.place for source in find_images(folder).sources})]


def _describe_quantizer(name: str, hashes: FileHashes) -> dict[str, str]:
    """What tells a quantizer from others: its files, or if it has none on this disk, its fingerprint."""
    path = Path(name.partition("@")[0])
    if path.exists():
        return hashes.hash_below(path)
    from being_vl.quantizer.base import load_quantizer

    return {name: load_quantizer(name, "cpu").fingerprint}


def check_inputs(options: RunOptions) -> None:
    """Find what would stop a later step, before the first one starts.

    Raises:
        ConfigError, ImageError, RecordError, ModelError, QuantizerError: if the inputs are missing or do not fit
            together.
    """
    from being_vl.model.expand import check_llm
    from being_vl.quantizer.base import load_quantizer

    _check_records(options)
    check_llm(options.llm)
    if not options.train_quantizer:
        load_quantizer(options.quantizer, "cpu")


def _check_records(options: RunOptions) -> None:
    """Raise a RecordError with the number of faults and the first of them, unless faults are tolerated."""
    from being_vl.data.records import Records
    from being_vl.images.lookup import ImageLookup, ListedImages

    quantize = options.quantize
    findings = find_images(options.images, quantize.root, quantize.allow_outside, quantize.column)
    lookup = ImageLookup([ListedImages(findings)])
    sequences = options.train.sequences
    records = Records(
        options.records, sequences.default_category, sequences.categories, sequences.images_in_front
    )
    if options.train.lenient:
        return
    faults = []
    for record in records.read():
        if isinstance(record, RecordError):
            faults.append(str(record))
            continue
        try:
            for name in record.images:
                lookup.find(name, record.source.absolute().parent)
        except RecordError as error:
            faults.append(f"{record.location}: {error}")
    if faults:
        raise RecordError(
            f"{len(faults)} of {len(records)} records have faults, the first: {'; '.join(faults[:SHOWN_FAULTS])}; "
            "mend them, or set train.lenient"
        )


class Steps:
    """Does each step of a run once.

    A finished step leaves `steps/<name>.json` in the run's folder: its options, the content of its inputs and outputs,
    the fingerprint of the step before, and the seconds it took.

    Args:
        out: The run's folder.
        overwrite: Do a step again that was finished with other options or inputs, or whose output was altered since.

    Attributes:
        hashes: The content of inputs and outputs; each file is read once.
    """

    def __init__(self, out: StrPath, overwrite: bool = False) -> None:
        self.folder = Path(out) / "steps"
        self.overwrite = overwrite
        self.hashes = FileHashes(Path(out) / "hashes.json")
        self._previous_fingerprint = ""

    def do(self, step: Step) -> None:
        """Call the step's function with its options, unless it is finished.

        Raises:
            FingerprintError: if it is finished, but with other options or inputs, or its output was altered, and it is
                not to be overwritten.
        """
        fields = _step_fields(step, self._previous_fingerprint)
        is_finished = self.is_finished(step)
        if is_finished:
            log.info("%s: finished before, skipped", step.name)
        else:
            path = self.folder / f"{step.name}.json"
            self._remove_outdated(step, read_json(path))
            path.unlink(missing_ok=True)
            log.info("%s: starting", step.name)
            start = time.perf_counter()
            step.function(step.options)
            seconds = round(time.perf_counter() - start, 1)
            time.sleep(MIN_AGE)  # so that what was made is old enough to be remembered
            outputs = self.hashes.hash_below(step.output) if step.output else {}
            write_json(path, fields | {"outputs": outputs, "seconds": seconds})
            self._previous_fingerprint = compute_fingerprint([fields, outputs])
            self.hashes.forget_disguised(step.files)
            log.info("%s: finished in %.1f s", step.name, seconds)
        self.hashes.save()

    def is_finished(self, step: Step) -> bool:
        """Whether the step after the last one that was asked about is finished with these options and inputs.

        Raises:
            FingerprintError: if it is finished, but with others, or its output was altered, and it is not to be
                overwritten.
        """
        fields = _step_fields(step, self._previous_fingerprint)
        entry = read_json(self.folder / f"{step.name}.json")
        self._previous_fingerprint = compute_fingerprint([fields, entry.get("outputs", {})])
        if not entry:
            return False
        place = f"step {step.name!r} in {self.folder.parent}"
        if changes := list(_describe_changes(entry, fields)):
            if not self.overwrite:
                raise FingerprintError(
                    f"{place} was finished with other options or inputs ({_join(changes)}); give the earlier ones, "
                    "--overwrite to do it again, or another out folder"
                )
            return False
        missing_names, altered_names = self._compare_output(step, entry)
        if not missing_names and not altered_names:
            return True
        is_gone = len(missing_names) == len(entry["outputs"])
        changes = [f"{show_name(name)} {verb}" for name, verb in altered_names.items()]
        changes += [f"{show_name(name)} is gone" for name in missing_names]
        if is_gone or (step.name in SHARDED and not altered_names):
            log.info("%s: %s was deleted and is made again (%s)", step.name, step.output, _join(changes))
        elif not self.overwrite:
            raise FingerprintError(
                f"{place}: {step.output} is not what the step has made ({_join(changes)}); put that back, or give "
                "--overwrite to do the step again"
            )
        return False

    def _compare_output(self, step: Step, entry: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
        """Names of the files of an output that are gone, and of those that have changed with what was done to them."""
        paths = _output_paths(step, entry)
        missing_names = [name for name, path in paths.items() if not path.exists()]
        altered_names = {
            name: "is no file" for name, path in paths.items() if path.exists() and not path.is_file()
        }
        files = {name: path for name, path in paths.items() if path.is_file()}
        digests = hash_files(files.values(), self.hashes)
        altered_names |= {
            name: "has changed" for name, path in files.items() if digests[path] != entry["outputs"][name]
        }
        return missing_names, altered_names

    def _remove_outdated(self, step: Step, entry: Mapping[str, Any]) -> None:
        """Remove of an earlier output what the step would otherwise take for its own of now; no foreign files."""
        paths = _output_paths(step, entry)
        missing_names, altered_names = self._compare_output(step, entry)
        inputs_changed = bool(entry) and entry["inputs"] != to_jsonable(step.inputs)
        is_outdated = inputs_changed and step.name in ("quantizer", "expand")
        if step.name in SHARDED and not self.hashes.has_disguised(step.files):
            # The job makes those shards again that are gone or whose images have changed.
            doomed_names = [*altered_names, *([MANIFEST] if altered_names or missing_names else [])]
        elif missing_names or altered_names or is_outdated or self.hashes.has_disguised(step.files):
            doomed_names = list(paths)
        else:
            return
        for path in (paths[name] for name in doomed_names if name in paths):
            if path.is_file():
                path.unlink()
        _remove_empty_folders(step.output)
        if step.account and self.hashes.has_disguised(step.files):
            # Records that were prepared are told from others by the size and time of their files.
            for shard in read_json(step.account / MANIFEST).get("shards", ()):
                (step.account / shard["file"]).unlink(missing_ok=True)


def _output_paths(step: Step, entry: Mapping[str, Any]) -> dict[str, Path]:
    """Name → path of each file that a step has made."""
    if step.output is None:
        return {}
    names = entry.get("outputs", {})
    return {name: step.output if name == "" else step.output / name for name in names}


def _remove_empty_folders(folder: Path | None) -> None:
    """Remove those of a folder and its subfolders that are empty."""
    if folder is None or not folder.is_dir():
        return
    for root, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # it is not empty
            Path(root).rmdir()


def _step_fields(step: Step, previous_fingerprint: str) -> dict[str, Any]:
    """What a step's output follows from."""
    return {
        "options": fixed_options(step.options),
        "inputs": to_jsonable(step.inputs),
        "previous": previous_fingerprint,
    }


def _describe_changes(entry: Mapping[str, Any], fields: Mapping[str, Any]) -> Iterator[str]:
    """What is different in the options and inputs of a step, in words."""
    yield from differences(entry.get("options"), fields["options"])
    old_inputs, inputs = entry.get("inputs") or {}, fields["inputs"]
    for kind in sorted({*old_inputs, *inputs}):
        old_values, values = old_inputs.get(kind, {}), inputs.get(kind, {})
        for name in sorted({*old_values, *values}):
            if old_values.get(name) != values.get(name) or (name in old_values) != (name in values):
                verb = (
                    "is new" if name not in old_values else "is gone" if name not in values else "has changed"
                )
                yield f"{kind} {show_name(name)} {verb}"
    if entry.get("previous") != fields["previous"]:
        yield "a step before it has been done again, with another result"


def _join(changes: Sequence[str]) -> str:
    """The first changes, and how many more there are."""
    count = len(changes) - SHOWN_FAULTS
    return "; ".join(changes[:SHOWN_FAULTS]) + (f" and {count:,} more" if count > 0 else "")
