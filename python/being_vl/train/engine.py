"""Staged training: for each stage a model, a DeepSpeed engine, its steps, and a plain checkpoint at the end."""

import contextlib
import fcntl
import gc
import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import distributed as dist

from being_vl.data.batches import load_batches
from being_vl.data.options import PrepareOptions
from being_vl.data.prepare import check_faults, find_grids, tokenise
from being_vl.data.sequences import SequenceBuilder
from being_vl.data.store import PreparedSequences, Sequences
from being_vl.errors import CheckpointError, ConfigError
from being_vl.files import (
    MANIFEST,
    read_manifest,
    sha256,
    to_jsonable,
    write_aside,
    write_json,
    write_manifest,
)
from being_vl.fingerprints import check_fingerprint
from being_vl.layout import LAYOUT_FILE, VocabularyLayout
from being_vl.model.expand import copy_companions
from being_vl.model.weights import load_causal_lm
from being_vl.options import fixed_options
from being_vl.train.checkpoint import Checkpoints, any_rank, newest
from being_vl.train.kernels import attention_kernel, compute_dtype, recompute, use_liger
from being_vl.train.log import TrainingLog
from being_vl.train.metrics import Cost, Tally, memory, peak_flops
from being_vl.train.optimizer import deepspeed_config, factor, make_optimizer, set_rates
from being_vl.train.options import StageOptions, TrainOptions
from being_vl.train.retention import TextProbe
from being_vl.train.schedule import Seen, StagePlan, check_packing, plan
from being_vl.train.signals import StopRequest, stop_on_signals
from being_vl.train.spikes import Watch
from being_vl.train.split import TrainedLM
from being_vl.train.stages import add_adapters, freeze

log = logging.getLogger(__name__)


def train(options: TrainOptions) -> Path:
    """Train a model stage by stage; run again after an interruption it goes on where it was.

    Under `torchrun` or `deepspeed` every rank calls it; alone it is a world of one rank.

    Returns:
        The folder of the last stage's checkpoint, loadable by `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ConfigError, RecordError, QuantizerError, ModelError: if the inputs do not fit together; before training.
        CheckpointError: if `out` holds a run of another recipe.
    """
    _start_ranks()
    with _alone(options.out):
        sequences = load_sequences(options)
        path = options.out / "recipe.json"
        # The ranks of the first start: batches are as large as it made them, on whatever ranks the run goes on.
        ranks = json.loads(path.read_text())["ranks"] if path.is_file() else dist.get_world_size()
        plans = plan(options, sequences.lengths, ranks)
        recipe = _recipe(options, plans, ranks)
        check_fingerprint(path, recipe)
        if dist.get_rank() == 0:
            write_json(path, recipe)
        source, before = options.model, 0
        with stop_on_signals() as stop:
            for stage_plan in plans:
                folder = options.out / stage_plan.stage.name
                if (folder / MANIFEST).is_file():
                    read_manifest(folder, "stage")
                    _say(f"{folder.name}: finished before, kept ({folder})")
                else:
                    if any_rank(stop.signal is not None)[0]:
                        _stopped(stop, f"before {folder.name}, nothing to save")
                    _train_stage(options, stage_plan, sequences, source, before, stop)
                source, before = folder, before + stage_plan.steps
    return source


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the lock of a run's folder: ranks that outlive a killed launcher still write there.

    The operating system frees the lock when the rank that holds it ends, however it ends. What rank 0 writes into it
    shows whether the other ranks see the same folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    mine: list[str | None] = [str(time.time_ns())]
    with (out / "lock").open("a") as lock:
        if dist.get_rank() == 0:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock.truncate(0)
                print(mine[0], file=lock, flush=True)
            except BlockingIOError:
                mine = [None]
        dist.broadcast_object_list(mine)
        if mine[0] is None:
            raise CheckpointError(
                f"{out}: another training is running in this folder; wait for it, end its processes, or choose another"
            )
        if any_rank((out / "lock").read_text().strip() != mine[0])[0]:
            raise CheckpointError(
                f"{out}: not all ranks see what rank 0 writes there; choose a folder that all nodes share"
            )
        yield


def _train_stage(
    options: TrainOptions,
    plan: StagePlan,
    sequences: Sequences,
    source: Path,
    before: int,
    stop: StopRequest,
) -> None:
    """Train one stage from the checkpoint at `source`; `before` counts the steps of the stages before it."""
    import deepspeed

    rank, world = dist.get_rank(), dist.get_world_size()
    stage, steps = plan.stage, plan.steps
    if plan.batch_size < world:
        raise ConfigError(
            f"stage {stage.name!r}: a batch of {plan.batch_size} rows has none for some of {world} ranks"
        )
    accumulation = math.ceil(plan.batch_size / (options.batches.micro_batch_size * world))
    _say(plan.describe())
    found = newest(options.out / "checkpoints", stage.name)
    config = deepspeed_config(options, accumulation)
    config["checkpoint"] = {"load_universal": found is not None and found.partitioned}
    model, table = _load_model(options, stage, source)
    _say(table)
    cost, peak = Cost.of(model), peak_flops(options.logging.peak_flops)
    optimizer = make_optimizer(model, options, stage)  # which looks at the shapes that ZeRO-3 hides
    _place(model, options, config)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    checkpoints = Checkpoints(engine, options.out / "checkpoints", stage.name, options.checkpoint.keep)
    done = checkpoints.resume(found)
    flat = model.lm.config._attn_implementation.startswith("flash")
    packing = options.batches.packing
    if packing:
        check_packing(model.lm, flat)
    logger = TrainingLog(options, stage.name, steps, done, before)
    watch = Watch(engine, optimizer, options.spikes.action, options.spikes.deviations, logger.entries)
    probe = TextProbe.of(options, source)
    if probe and done == 0:
        probe.measure(engine, logger, 0)
    seen = Seen(plan)
    steps_left = seen.after(done)
    batches = load_batches(steps_left, sequences, accumulation, rank, world, options.workers, flat, packing)
    started = time.perf_counter()
    for step, (rows, micro_batches) in enumerate(batches, start=done + 1):
        rates = set_rates(optimizer, factor(stage, step - 1, steps))
        own = [
            [float(micro["weights"].sum()), int(micro.pop("tokens")), micro["weights"].numel()]
            for micro in micro_batches
        ]
        sizes = torch.tensor(own, dtype=torch.float64, device=engine.device).sum(0)
        dist.all_reduce(sizes)
        weight, tokens, cells = sizes.tolist()
        tally = Tally(model.embedding.text_size, sequences.categories, engine.device)
        for index, micro in enumerate(micro_batches):
            # What dropout draws depends on the position alone, so a resumed run draws the same, on any number of ranks.
            torch.manual_seed(options.seed + ((before + step) * accumulation + index) * world + rank)
            inputs = {name: tensor.to(engine.device, non_blocking=True) for name, tensor in micro.items()}
            of_loss = {name: inputs.pop(name) for name in ("weights", "categories")}
            loss = tally.add(engine(**inputs), inputs["labels"], **of_loss)
            # DeepSpeed divides by accumulation and averages over ranks; undone here, so that the gradient is that of
            # the weighted mean over all labelled tokens of the global batch, however that is cut up.
            engine.backward(loss * (accumulation * world / weight))
            if index < accumulation - 1:
                engine.step()
        entry = {"step": step, **tally.means()}
        entry |= watch.step(entry["loss"])
        seconds = time.perf_counter() - started
        seen.add(rows)
        read = [record for row in rows for record in row]
        flops = cost.flops([record.length for record in read], entry["labelled_tokens"]) if cost else None
        entry |= {
            **rates,
            "tokens": int(tokens),
            "tokens_per_second": tokens / seconds,
            "mfu": flops / (seconds * world * peak) if flops and peak else None,
            "padding": 1 - tokens / cells,
            "fill": tokens / (plan.batch_size * packing) if packing else None,
            "memory": memory(),
            "seconds": seconds,
            **seen.shares(),
        }
        if "trouble" in entry:
            entry["records"] = [sequences.get(e.group, e.number, e.position).where for e in read]
        logger.step(entry)
        watch.report(stage.name, entry)
        stopping = checkpoints.agree(stop.signal is not None)
        if step < steps and (stopping or step % options.checkpoint.every == 0):
            checkpoints.save(step)
        if stopping:
            stop.heard.set()
        if step < steps and stopping:
            checkpoints.finish()
            logger.close()
            _stopped(stop, f"after step {step} of {stage.name}, saved")
        started = time.perf_counter()

    if probe:
        probe.measure(engine, logger, steps)
    checkpoints.finish()
    _save_plain(engine, model, options, stage, source, steps)
    logger.close()
    checkpoints.close()
    engine.destroy()
    del engine, optimizer, watch, model, checkpoints
    gc.collect()
    dist.barrier()


def _start_ranks() -> None:
    """Join the process group, as torchrun or deepspeed describes it, or as a world of one."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    if dist.is_initialized():
        return
    # Without this, every start on a CPU compiles a shared-memory extension for more than a minute.
    __compatible_ops__["deepspeed_shm_comm"] = False
    on_gpu = torch.cuda.is_available()
    alone = {} if "RANK" in os.environ else _world_of_one()
    os.environ.update(alone)
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", timeout=timedelta(hours=1))
    # What this process starts later must not take itself for a rank of this world; DeepSpeed reads LOCAL_RANK again.
    for name in alone.keys() - {"LOCAL_RANK"}:
        del os.environ[name]


def _world_of_one() -> dict[str, str]:
    """The environment that torchrun would give to a single rank."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def _say(message: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        log.info(message)


def load_sequences(options: TrainOptions) -> PreparedSequences:
    """The sequences of a training, prepared on all ranks unless `records` is a folder where that was done."""
    prepared = len(options.records) == 1 and (options.records[0] / MANIFEST).is_file()
    folder = options.records[0] if prepared else options.out / "prepared"
    preparation = PrepareOptions(
        options.model,
        options.records,
        folder,
        find_grids(folder, options.grids) if prepared else options.grids,
        options.sequences,
        shard_size=options.shard_size,
        workers=options.workers,
    )
    sequences = options.sequences
    builder = SequenceBuilder.from_model(
        options.model, preparation.grids, sequences.max_length, sequences.too_long, sequences.loss
    )
    if not prepared:
        tokenise(preparation, builder, inputs_may_move=True)
        if dist.is_initialized():
            dist.barrier()
    check_faults(folder, options.lenient)
    return PreparedSequences(
        folder, builder, options.batches.bpe_dropout, options.seed, options.batches.packing
    )


def _recipe(options: TrainOptions, plans: list[StagePlan], ranks: int) -> dict[str, Any]:
    """All that the losses of a run depend on, to be compared when it is resumed."""
    recipe = fixed_options(options)
    for stage, stage_plan in zip(recipe["stages"], plans, strict=True):
        del stage["accumulation"]
        stage["batch_size"] = stage_plan.batch_size
    return recipe | {"ranks": ranks} | _hashes(options)


def _hashes(options: TrainOptions) -> dict[str, Any]:
    """SHA-256 of all that is read, by one rank on each node, since local copies may differ.

    Raises:
        ConfigError: if they do.
    """
    inputs = {
        "records": [path / MANIFEST if path.is_dir() else path for path in options.records],
        "model": sorted(options.model.glob("*.safetensors")),
        "grids": [options.grids / MANIFEST] if options.grids else [],
    }
    own = None
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with ThreadPoolExecutor() as threads:
            own = {name: list(threads.map(sha256, files)) for name, files in inputs.items()}
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    first, *others = filter(None, found)
    different = [name for name in inputs if any(other[name] != first[name] for other in others)]
    if different:
        raise ConfigError(f"{' and '.join(different)}: not the same files on all nodes; copy them again")
    return {f"{name}_sha256": hashes for name, hashes in first.items()}


def _load_model(options: TrainOptions, stage: StageOptions, source: Path) -> tuple[TrainedLM, str]:
    lm = load_causal_lm(source, "auto", attention_kernel(options.precision))
    if options.gradient_checkpointing:
        recompute(lm)
    if options.precision.liger:
        use_liger(lm)
    layout = VocabularyLayout.load(source) if (source / LAYOUT_FILE).is_file() else None
    model = TrainedLM(lm, layout.text_size if layout else lm.config.vocab_size, options.loss_chunk)
    if stage.lora:
        torch.manual_seed(options.seed)
        add_adapters(model, stage)
    table = freeze(model, stage)
    model.train()
    return model, table


def _place(model: TrainedLM, options: TrainOptions, config: dict[str, Any]) -> None:
    """Bring the parameters to this rank's device, and under ZeRO-3 its part of each, in the dtype of the computation.

    Until then they are the checkpoint's file, mapped into memory. One after the other, so that beside a GPU the host's
    memory never holds all of them.
    """
    import deepspeed

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    for buffer in model.buffers():  # DeepSpeed leaves those of a model that is partitioned where they are
        buffer.data = buffer.data.to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, compute_dtype(options.precision), copy=True)
        if options.zero == 3:
            deepspeed.zero.Init(torch.nn.ParameterList([parameter]), config_dict_or_path=config)


def _stopped(stop: StopRequest, where: str) -> NoReturn:
    """End this rank with status 0, and with it the training: all ranks call it after the same step."""
    _say(
        f"stopped by {stop.signal or 'a signal to another rank'} {where}; the same command goes on from there"
    )
    raise SystemExit(0)


def _save_plain(
    engine: Any, model: TrainedLM, options: TrainOptions, stage: StageOptions, source: Path, steps: int
) -> None:
    """Write the stage's result as a plain Hugging Face folder, and check it by loading it.

    Trained parameters are copied into the model that the stage started from, read anew from disk: what was frozen
    stays bit-identical and keeps its dtype, even if the stage computed in bf16.

    Raises:
        CheckpointError: if the model that was loaded gives other logits than the one that was trained.
    """
    import deepspeed

    engine.eval()
    rows = model.lm.config.vocab_size
    ids = torch.arange(32).mul(max(1, rows // 32)).clamp(max=rows - 1)[None]  # text and new rows alike
    with torch.no_grad():
        expected = engine(input_ids=ids.to(engine.device)).cpu()
    trained = {}
    for name, parameter in model.lm.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                if dist.get_rank() == 0:
                    trained[name] = parameter.detach().cpu().clone()
    if dist.get_rank() == 0:
        result = load_causal_lm(source, "auto")
        model.merge_into(result, trained)
        with write_aside(options.out / stage.name) as folder:
            result.save_pretrained(folder)
            del result
            copy_companions(source, folder)
            write_manifest(
                folder,
                "stage",
                {"stage": to_jsonable(stage), "steps": steps, "trained": sorted(trained)},
            )
            _check_plain(folder, ids, expected)
        _say(f"{stage.name}: saved to {options.out / stage.name}")
    dist.barrier()


def _check_plain(folder: Path, ids: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare the logits (T, V) of ids (1, T) by the model in a folder with those expected, in their dtype."""
    with torch.no_grad():
        lm = load_causal_lm(folder, "auto")
        exact = lm.dtype is expected.dtype is torch.float32
        found = lm.to(expected.dtype).eval()(input_ids=ids).logits[0]
    away = (torch.dist(found.float(), expected.float()) / expected.float().norm()).item()
    if not away < (1e-3 if exact else 0.1):
        raise CheckpointError(
            f"{folder.with_suffix('')}: the saved model gives logits that are {away:.1%} away from those of the "
            "trained one; it is not kept. Please report this"
        )
