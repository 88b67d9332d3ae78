"""The whole chain on one's own images and records: quantize, learn the vocabulary, expand, train."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from being_vl.errors import ConfigError, FingerprintError, RecordError
from being_vl.files import sha256, write_json
from being_vl.fingerprints import compute_fingerprint, differences
from being_vl.options import StrPath, fixed_options
from being_vl.outputs import check_folder, claim_folder, free_locks
from being_vl.quantizer.options import QuantizeOptions
from being_vl.quantizer.training.options import QuantizerTrainOptions
from being_vl.recipes.options import RunOptions

log = logging.getLogger(__name__)

KINDS = ("run", "demo")
"""Kinds of the fingerprints of folders that runs go on in; a demo is a run with some steps more."""
SHOWN_FAULTS = 3
"""Faults of records that an error quotes."""


class Step(NamedTuple):
    """A step of a run.

    Args:
        name: Its name.
        function: What does it; takes the options.
        options: Its options dataclass.
        inputs: What it reads that neither its options nor the steps before it decide, as a JSON-able value.
        output: What it makes.
    """

    name: str
    function: Callable[[Any], Any]
    options: Any
    inputs: Any
    output: Path


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
    for step in list_steps(options):
        steps.do(step.name, step.function, step.options, step.inputs)
    if step.name == "train":
        log.info("trained model: %s", step.output)
        log.info("ask it: being-vl generate --model %s --image FILE --prompt TEXT", step.output)
    else:
        log.info("%s is as far as asked for: %s", step.name, step.output)
    return step.output


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
    for step in list_steps(options):
        if step.name == "train" and is_finished:
            from being_vl.training.engine import plan_training

            yield plan_training(step.options, options.ranks or count_ranks(options.device))
        is_finished = steps.is_finished(step.name, step.options, step.inputs)
        yield f"{step.name + ':':<12}{'finished' if is_finished else 'to do':<10}{step.output}"


def _check_output(options: RunOptions) -> None:
    """Refuse a folder that holds anything else than a run, or lies in what is read."""
    records = [file.path for file in options.records]
    inputs: list[StrPath] = [options.images, *records, options.llm, options.quantizer]
    check_folder(options.out, *KINDS, inputs=inputs)


def list_steps(options: RunOptions) -> Iterator[Step]:
    """The steps of a run in their order, up to `until`."""
    from being_vl.launch.local import quantize_on_ranks, train_on_ranks, train_quantizer_on_ranks
    from being_vl.model.expand import expand
    from being_vl.tokenizer.train import train_vocabulary

    def train_quantizer(step: QuantizerTrainOptions) -> None:
        train_quantizer_on_ranks(step, options.ranks)

    def quantize(step: QuantizeOptions) -> None:
        quantize_on_ranks(step, options.ranks)

    def train(step: Any) -> None:
        train_on_ranks(step, options.ranks, options.device)

    images = _listing(options.images)
    if options.train_quantizer:
        quantizer = options.quantizer_training
        yield Step("quantizer", train_quantizer, quantizer, images, quantizer.out)
    model = options.train.out / options.train.stages[-1].name
    records = {
        str(file.path): {"sha256": sha256(file.path), "category": file.category} for file in options.records
    }
    for step in (
        Step("quantize", quantize, options.quantize, images, options.quantize.out),
        Step("vocab", train_vocabulary, options.vocab, None, options.vocab.out),
        Step("expand", expand, options.expand, None, options.expand.out),
        Step("train", train, options.train, records, model),
    ):
        yield step
        if step.name == options.until:
            return


def check_inputs(options: RunOptions) -> None:
    """Find what would stop a later step, before the first one starts.

    Raises:
        ConfigError, ImageError, RecordError, ModelError, QuantizerError: if the inputs are missing or do not fit
            together.
    """
    from being_vl.model.expand import check_llm
    from being_vl.quantizer.base import load_quantizer

    if not options.images.is_dir():
        raise ConfigError(f"images: there is no folder {options.images}")
    _check_records(options)
    check_llm(options.llm)
    if not options.train_quantizer:
        load_quantizer(options.quantizer, "cpu")


def _check_records(options: RunOptions) -> None:
    """Raise a RecordError with the number of faults and the first of them, unless faults are tolerated."""
    from being_vl.data.records import Records
    from being_vl.images.lookup import ImageLookup, ListedImages
    from being_vl.images.sources import find_images

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

    A finished step leaves `steps/<name>.json` in the run's folder: its options, its inputs, the fingerprint of the step
    before, and the seconds it took.

    Args:
        out: The run's folder.
        overwrite: Do a step again that was finished with other options or inputs.
    """

    def __init__(self, out: StrPath, overwrite: bool = False) -> None:
        self.folder = Path(out) / "steps"
        self.overwrite = overwrite
        self._previous_fingerprint = ""

    def do(self, name: str, function: Callable[[Any], Any], options: Any, inputs: Any = None) -> None:
        """Call `function(options)`, unless the step is finished.

        Raises:
            FingerprintError: if it is finished, but with other options or inputs, and not to be overwritten.
        """
        previous_fingerprint = self._previous_fingerprint
        if self.is_finished(name, options, inputs):
            log.info("%s: finished before, skipped", name)
            return
        path = self.folder / f"{name}.json"
        path.unlink(missing_ok=True)
        log.info("%s: starting", name)
        start = time.perf_counter()
        function(options)
        seconds = round(time.perf_counter() - start, 1)
        write_json(path, _step_fields(options, inputs, previous_fingerprint) | {"seconds": seconds})
        log.info("%s: finished in %.1f s", name, seconds)

    def is_finished(self, name: str, options: Any, inputs: Any = None) -> bool:
        """Whether the step after the last one that was asked about is finished with these options and inputs.

        Raises:
            FingerprintError: if it is finished, but with others, and not to be overwritten.
        """
        fields = _step_fields(options, inputs, self._previous_fingerprint)
        self._previous_fingerprint = compute_fingerprint(fields)
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return False
        entry = json.loads(path.read_text(encoding="utf-8"))
        entry.pop("seconds")
        changes = list(differences(entry, fields))
        if changes and not self.overwrite:
            raise FingerprintError(
                f"step {name!r} in {self.folder.parent} was finished with other options or inputs "
                f"({'; '.join(changes)}); give the earlier ones, --overwrite to do it again, or another out folder"
            )
        return not changes


def _step_fields(options: Any, inputs: Any, previous_fingerprint: str) -> dict[str, Any]:
    """What a step's output follows from."""
    return {"options": fixed_options(options), "inputs": inputs, "previous": previous_fingerprint}


def _listing(folder: Path) -> str:
    """Fingerprint of the names and sizes of the files in a folder."""
    return compute_fingerprint(
        sorted((str(f.relative_to(folder)), f.stat().st_size) for f in folder.rglob("*") if f.is_file())
    )
