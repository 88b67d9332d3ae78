"""Staged training from its options to the last stage's model."""

import gc
import tempfile
from pathlib import Path
from typing import Any

from torch import distributed as dist

from being_vl.data.options import PrepareOptions
from being_vl.data.prepare import check_faults, find_grids, tokenise
from being_vl.data.sequences import SequenceBuilder
from being_vl.data.store import PreparedSequences, verify_sequences
from being_vl.errors import ConfigError, FingerprintError
from being_vl.files import MANIFEST, read_manifest
from being_vl.fingerprints import FINGERPRINT, check_fingerprint, write_fingerprint
from being_vl.options import StrPath
from being_vl.progress import show_log_lines
from being_vl.training.fingerprint import (
    check_output,
    find_outputs,
    hash_inputs,
    hash_inputs_of_nodes,
    is_stage,
    read_fields,
    remove_outputs,
    training_fingerprint,
)
from being_vl.training.loading import load_model_without_weights
from being_vl.training.options import TrainOptions
from being_vl.training.ranks import hold_folder, log_once, start_ranks
from being_vl.training.schedule import StageSchedule, make_schedules
from being_vl.training.signals import StopRequest, stop_on_signals
from being_vl.training.stage import StageTrainer, end_if_asked


@show_log_lines()
def train(options: TrainOptions) -> Path:
    """Train a model stage by stage; called again after an interruption it goes on where it was.

    Under `torchrun` or `deepspeed` every rank calls it; otherwise this process is the only rank.

    Returns:
        The folder of the last stage's model, loadable by `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ConfigError, RecordError, QuantizerError, ModelError: if the inputs do not fit together; before training.
        FingerprintError: if `out` holds a training of other options or inputs, unless `overwrite` is set.
        OutputError: if `out` holds anything else, or another process is writing there.
        CheckpointError: if a checkpoint cannot be written or read.
        TrainingError: if a step is so bad that training must stop.
        SystemExit: with status 0, if SIGTERM or SIGUSR1 stopped the training before its end; it is saved.
    """
    check_output(options)
    start_ranks()
    with hold_folder(options.out):
        # What is in `out` is compared before anything is written there.
        fingerprint = _fingerprint(
            options, hash_inputs_of_nodes(options.model, options.records, options.grids)
        )
        is_replaced = _replaces_training(options, fingerprint)
        sequences = load_sequences(options)
        if is_replaced:
            _remove_outputs(options.out)
            fingerprint["ranks"] = dist.get_world_size()
        schedules = make_schedules(options, sequences.lengths, fingerprint["ranks"])
        if dist.get_rank() == 0:
            write_fingerprint(options.out / FINGERPRINT, fingerprint)
        with stop_on_signals() as stop:
            return _train_stages(options, schedules, sequences, stop)


def _train_stages(
    options: TrainOptions,
    schedules: list[StageSchedule],
    sequences: PreparedSequences,
    stop: StopRequest,
) -> Path:
    """Train the stages that are not finished, each from the one before; returns the last one's folder."""
    source, steps_before = options.model, 0
    for schedule in schedules:
        folder = options.out / schedule.stage.name
        if (folder / MANIFEST).is_file():
            read_manifest(folder, "stage")
            log_once(f"{folder.name}: finished before, kept ({folder})")
        else:
            end_if_asked(stop, folder.name)
            StageTrainer(options, schedule, sequences, source, steps_before, stop).run()
            # The engine's memory is free before the next one is made.
            gc.collect()
            dist.barrier()
        source, steps_before = folder, steps_before + schedule.steps
    return source


def _fingerprint(options: TrainOptions, inputs: dict[str, Any], ranks: int | None = None) -> dict[str, Any]:
    """The fingerprint of a training: for the ranks of its first start, if there was one, else for those of now."""
    return (
        training_fingerprint(options, read_fields(options.out).get("ranks", ranks or dist.get_world_size()))
        | inputs
    )


def _replaces_training(options: TrainOptions, fingerprint: dict[str, Any]) -> bool:
    """Whether `out` holds another training, which this one is to replace.

    Raises:
        FingerprintError: if it does, and `overwrite` is not set; or a stage's folder is something else.
    """
    _check_stage_folders(options)
    try:
        check_fingerprint(options.out / FINGERPRINT, fingerprint)
    except FingerprintError:
        # A start that failed before its first step has left nothing to lose.
        has_output = find_outputs(options.out) != [options.out / FINGERPRINT]
        if has_output and not _may_overwrite(options):
            raise
        return True
    return False


def _remove_outputs(out: Path) -> None:
    """Remove what another training has left; all ranks call it."""
    dist.barrier()  # until all ranks have read what rank 0 removes
    if dist.get_rank() == 0:
        remove_outputs(out)
    dist.barrier()


def _may_overwrite(options: TrainOptions) -> bool:
    """Whether the training in `out` is to be replaced, and can be: this one must not start from what would go."""
    outputs = {path.resolve() for path in find_outputs(options.out)}
    return options.overwrite and bool(outputs) and options.model.resolve() not in outputs


def _check_stage_folders(options: TrainOptions) -> None:
    """Raise a `FingerprintError` if a folder that a stage is to write is there and no stage has written it."""
    for stage in options.stages:
        folder = options.out / stage.name
        if folder.exists() and not is_stage(folder):
            raise FingerprintError(
                f"{folder}: is there, and no training has made it; choose another out or another name for the stage"
            )


def load_sequences(options: TrainOptions, folder: StrPath | None = None) -> PreparedSequences:
    """The sequences of a training, prepared on all ranks unless `records` is a folder where that was done.

    Args:
        options: Of the training.
        folder: Where they are prepared; by default `prepared` in the training's `out`.

    Raises:
        RecordError: if records have faults, unless `lenient`; or none is left.
        ConfigError, ModelError, QuantizerError, ManifestError: if the inputs do not fit together.
        FingerprintError: if the folder holds sequences of other options, unless `overwrite` is set.
    """
    # Records, or a folder in which they were prepared.
    first_path = options.records[0].path if len(options.records) == 1 else None
    is_prepared = first_path is not None and (first_path / MANIFEST).is_file()
    folder = first_path if first_path and is_prepared else Path(folder or options.out / "prepared")
    if is_prepared and options.records[0].category:
        raise ConfigError(
            f"records: {folder} was prepared before, with the categories of its records; `being-vl prepare` takes the "
            "category"
        )
    preparation = PrepareOptions(
        options.model,
        options.records,
        folder,
        find_grids(folder, options.grids) if is_prepared else options.grids,
        options.sequences,
        shard_size=options.shard_size,
        workers=options.workers,
        overwrite=options.overwrite,
    )
    # Tokenise what is not tokenised yet; every rank makes some of the files.
    sequences = options.sequences
    builder = SequenceBuilder.from_model(
        options.model, preparation.grids, sequences.max_length, sequences.too_long, sequences.loss
    )
    if not is_prepared:
        tokenise(preparation, builder, inputs_may_move=True)
        if dist.is_initialized():
            dist.barrier()
    check_faults(folder, options.lenient)
    # The ranks verify the files together, and none reads them before all have done so.
    if dist.is_initialized():
        verify_sequences(folder, dist.get_rank(), dist.get_world_size())
        dist.barrier()
    else:
        verify_sequences(folder)
    batches = options.batches
    return PreparedSequences(
        folder, builder, batches.bpe_dropout, options.seed, batches.packing, verify=False
    )


@show_log_lines()
def plan_training(options: TrainOptions, ranks: int = 1) -> str:
    """Check a training before it starts, and say what its stages will train and read; nothing is written.

    Records are prepared in a temporary folder, which takes the time that it takes in the training. Not checked is what
    needs the weights or the devices: whether the weights can be read, the kernels are there, nodes have the same files,
    and the memory is enough (`being-vl plan` estimates it).

    Args:
        options: Of the training.
        ranks: Number of processes that it will have.

    Returns:
        For each stage a table of what trains, its steps and its mixture.

    Raises:
        ConfigError, RecordError, QuantizerError, ModelError, FingerprintError, OutputError: as `train`.
    """
    check_output(options)
    # What is in `out` already: hashing the weights takes a while, and there need be nothing to compare with.
    is_begun = (options.out / FINGERPRINT).is_file()
    inputs = hash_inputs(options.model, options.records, options.grids) if is_begun else {}
    fingerprint = _fingerprint(options, inputs, ranks)
    if _replaces_training(options, fingerprint):
        fingerprint["ranks"] = ranks
    with tempfile.TemporaryDirectory() as folder:
        lengths = load_sequences(options, Path(folder) / "prepared").lengths
        # Stages as they would train the model, without its weights.
        paragraphs = []
        for schedule in make_schedules(options, lengths, fingerprint["ranks"]):
            _, table = load_model_without_weights(options.model, schedule.stage)
            paragraphs += [table, schedule.describe()]
    return "\n".join(paragraphs)
