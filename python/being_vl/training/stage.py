"""One stage of a training: a DeepSpeed engine, its optimizer steps, and a plain model at the end."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch import distributed as dist

from being_vl.data.batches import Row, load_batches
from being_vl.data.store import Sequences
from being_vl.errors import ConfigError
from being_vl.files import to_jsonable
from being_vl.options import StrPath
from being_vl.training.checkpoint import Checkpoints, find_newest
from being_vl.training.export import export_stage
from being_vl.training.kernels import compute_dtype
from being_vl.training.loading import load_model, place_parameters
from being_vl.training.log import TrainingLog
from being_vl.training.metrics import BatchTotals, Cost, LossSums, find_peak_flops, peak_memory
from being_vl.training.optimizer import (
    learning_rate_factor,
    make_deepspeed_config,
    make_optimizer,
    set_learning_rates,
)
from being_vl.training.options import TrainOptions
from being_vl.training.ranks import all_reduce_any, log_once
from being_vl.training.retention import TextProbe
from being_vl.training.schedule import StageProgress, StageSchedule, check_packing
from being_vl.training.signals import StopRequest
from being_vl.training.spikes import SpikeGuard

MicroBatch = dict[str, Tensor]
"""Tensors of the rows of one forward pass, as `being_vl.data.batches` makes them."""


class StageTrainer:
    """Trains one stage; every rank has one, and all call the same methods.

    The gradient of a step is that of the mean loss over all label tokens of the global batch, however ranks and
    micro-batches cut it up.

    Args:
        options: Of the training.
        schedule: What the stage reads.
        sequences: The records' sequences.
        source: Folder of the model that the stage starts from.
        steps_before: Optimizer steps of the stages before it.
        stop: Whether a signal has asked to stop.

    Raises:
        ConfigError: if there are more ranks than rows in a batch.
        CheckpointError: if there is a checkpoint that cannot be resumed from.
        ModelError: if the model cannot be trained, or not on packed rows.
    """

    def __init__(
        self,
        options: TrainOptions,
        schedule: StageSchedule,
        sequences: Sequences,
        source: StrPath,
        steps_before: int,
        stop: StopRequest,
    ) -> None:
        self._options, self._schedule, self._sequences = options, schedule, sequences
        self._source, self._steps_before, self._stop = Path(source), steps_before, stop
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._stage, self._steps = schedule.stage, schedule.steps
        if schedule.batch_size < self._ranks:
            raise ConfigError(
                f"stage {self._stage.name!r}: a batch of {schedule.batch_size} rows has none for some of "
                f"{self._ranks} ranks"
            )
        rows_of_pass = options.batches.micro_batch_size * self._ranks
        self._accumulation = math.ceil(schedule.batch_size / rows_of_pass)
        log_once(schedule.describe())
        self._start_engine()
        self._start_log()

    def _start_engine(self) -> None:
        """Load the model, give it to DeepSpeed, and resume from the newest checkpoint, if there is one."""
        import deepspeed

        options, stage = self._options, self._stage
        dtype, root = compute_dtype(options.precision), options.out / "checkpoints"
        checkpoint = find_newest(root, stage.name)
        config = make_deepspeed_config(
            options.zero,
            options.offload,
            dtype,
            options.batches.micro_batch_size,
            self._accumulation,
            options.optimizer.gradient_clipping,
        )
        config["checkpoint"] = {"load_universal": checkpoint is not None and checkpoint.needs_conversion}
        self._model, table = load_model(
            self._source,
            stage,
            options.precision,
            options.loss_chunk,
            options.gradient_checkpointing,
            options.seed,
        )
        log_once(table)
        # What looks at the parameters' shapes comes before ZeRO-3 hides them.
        self._cost = Cost.from_model(self._model)
        self._peak_flops = find_peak_flops(options.logging.peak_flops)
        is_offloaded = options.offload == "optimizer"
        self._optimizer = make_optimizer(self._model, stage, options.optimizer, is_offloaded)
        place_parameters(self._model, dtype, config)
        self._engine, *_ = deepspeed.initialize(model=self._model, optimizer=self._optimizer, config=config)
        self._checkpoints = Checkpoints(self._engine, root, stage.name, options.checkpoint.keep)
        self._resumed_step = self._checkpoints.resume(checkpoint)
        # FlashAttention reads all rows as one; packed records must not see each other.
        self._is_flat = self._model.lm.config._attn_implementation.startswith("flash")
        if options.batches.packing:
            check_packing(self._model.lm, self._is_flat)

    def _start_log(self) -> None:
        """Go on with the log, and with what looks back on it."""
        options, stage = self._options, self._stage
        self._log = TrainingLog(
            options.out,
            stage.name,
            self._steps,
            self._resumed_step,
            self._steps_before,
            options.logging.wandb,
            to_jsonable(options),
        )
        self._guard = SpikeGuard(self._engine, self._optimizer, options.spikes, self._log.entries)
        self._probe = TextProbe.from_model(self._source, options.retention, options.sequences.max_length)
        self._progress = StageProgress(self._schedule)

    def run(self) -> None:
        """Take the steps that are left, and write the result to the stage's folder.

        Raises:
            TrainingError: if a step is so bad that training must stop.
            CheckpointError: if a checkpoint or the result cannot be written.
            SystemExit: with status 0, on all ranks after the same step, if one of them has been asked to stop.
        """
        if self._probe and self._resumed_step == 0:
            self._probe.measure(self._engine, self._log, 0)
        batches = self._load_batches()
        self._step_start = time.perf_counter()
        for step, (rows, micro_batches) in enumerate(batches, start=self._resumed_step + 1):
            self._take_step(step, rows, micro_batches)
            self._save_or_stop(step)
            self._step_start = time.perf_counter()
        self._finish()

    def _load_batches(self) -> Iterator[tuple[list[Row], list[MicroBatch]]]:
        """The rows of each step that is left, and of these the micro-batches that this rank reads."""
        return load_batches(
            self._progress.rows_after(self._resumed_step),
            self._sequences,
            self._accumulation,
            self._rank,
            self._ranks,
            self._options.workers,
            self._is_flat,
            self._options.batches.packing,
        )

    def _take_step(self, step: int, rows: list[Row], micro_batches: list[MicroBatch]) -> None:
        """Take one optimizer step and log it."""
        rates = set_learning_rates(self._optimizer, learning_rate_factor(self._stage, step - 1, self._steps))
        totals = BatchTotals.sum_over_ranks(micro_batches, self._engine.device)
        entry = {"step": step, **self._accumulate_gradient(step, micro_batches, totals.label_weight)}
        entry |= self._guard.step(entry["loss"])
        seconds = time.perf_counter() - self._step_start
        self._progress.add(rows)
        entry |= rates | self._measure(rows, totals, entry["label_tokens"], seconds)
        entry |= self._progress.shares()
        if "trouble" in entry:
            entry["records"] = [
                self._sequences.get(record.group, record.number, record.position).location
                for row in rows
                for record in row
            ]
        self._log.add_step(entry)
        self._guard.report(self._stage.name, entry)

    def _accumulate_gradient(
        self, step: int, micro_batches: list[MicroBatch], label_weight_of_all_ranks: float
    ) -> dict[str, Any]:
        """Run the micro-batches of a step forward and backward; returns the mean losses over all ranks."""
        sums = LossSums(self._model.embedding.text_size, self._sequences.categories, self._engine.device)
        # DeepSpeed divides by the accumulation and averages over ranks. Undone here, so that the gradient is that of
        # the weighted mean over all label tokens of the global batch.
        scale = self._accumulation * self._ranks / label_weight_of_all_ranks
        for index, micro_batch in enumerate(micro_batches):
            # What dropout draws depends on the position alone, so a resumed run draws the same, on any number of ranks.
            position = (self._steps_before + step) * self._accumulation + index
            torch.manual_seed(self._options.seed + position * self._ranks + self._rank)
            inputs = {
                name: tensor.to(self._engine.device, non_blocking=True)
                for name, tensor in micro_batch.items()
                if name != "tokens"
            }
            weights, categories = inputs.pop("weights"), inputs.pop("categories")
            loss = sums.add(self._engine(**inputs), inputs["labels"], weights, categories)
            self._engine.backward(loss * scale)
            # After the last one DeepSpeed's step is the optimizer's, which the guard takes.
            if index < self._accumulation - 1:
                self._engine.step()
        return sums.means_over_ranks()

    def _measure(
        self, rows: list[Row], totals: BatchTotals, label_tokens: int, seconds: float
    ) -> dict[str, Any]:
        """For the log: how much was read, how fast, and how well device, rows and memory were used."""
        lengths = [record.length for row in rows for record in row]
        flops = self._cost.flops(lengths, label_tokens) if self._cost else None
        peak, packing = self._peak_flops, self._options.batches.packing
        return {
            "tokens": int(totals.tokens),
            "tokens_per_second": totals.tokens / seconds,
            "mfu": flops / (seconds * self._ranks * peak) if flops and peak else None,
            "padding": 1 - totals.tokens / totals.positions,
            "fill": totals.tokens / (self._schedule.batch_size * packing) if packing else None,
            "memory": peak_memory(),
            "seconds": seconds,
        }

    def _save_or_stop(self, step: int) -> None:
        """Save a checkpoint where one is due; end all ranks, if one of them has been asked to stop."""
        must_stop = self._checkpoints.agree(self._stop.signal is not None)
        is_last = step == self._steps
        if not is_last and (must_stop or step % self._options.checkpoint.every == 0):
            self._checkpoints.save(step)
        if must_stop:
            self._stop.agreement.set()
        if must_stop and not is_last:
            self._checkpoints.finish()
            self._log.close()
            end_training(self._stop, f"after step {step} of {self._stage.name}, saved")

    def _finish(self) -> None:
        """Write the result, and let go of engine and checkpoints."""
        if self._probe:
            self._probe.measure(self._engine, self._log, self._steps)
        self._checkpoints.finish()
        folder = self._options.out / self._stage.name
        export_stage(self._engine, self._model, self._stage, self._steps, self._source, folder)
        self._log.close()
        self._checkpoints.close()
        self._engine.destroy()


def end_if_asked(stop: StopRequest, stage: str) -> None:
    """End all ranks before a stage, if one of them has been asked to stop.

    Raises:
        SystemExit: with status 0, if so.
    """
    if all_reduce_any(stop.signal is not None)[0]:
        end_training(stop, f"before {stage}, nothing to save")


def end_training(stop: StopRequest, position: str) -> NoReturn:
    """End this rank with status 0, and with it the training: all ranks call it after the same step."""
    log_once(
        f"stopped by {stop.signal or 'a signal to another rank'} {position}; the same command goes on from there"
    )
    raise SystemExit(0)
