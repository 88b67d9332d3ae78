"""Checkpoints to resume from: written in the background, complete or not there, and of this recipe or refused."""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import xxhash
from torch import distributed as dist

from being_vl.errors import CheckpointError
from being_vl.files import fsync, remove, write_json
from being_vl.options import StrPath
from being_vl.training.ranks import all_reduce_any

log = logging.getLogger(__name__)

COMPLETE = "complete.json"
"""File that makes a checkpoint's folder count: its step, ranks and ZeRO stage, sizes and checksums of its files."""

FLUSH_BYTES = 8 << 20
"""Bytes that are written to a file before they are flushed to the disk."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete and undamaged checkpoint of one stage.

    Args:
        folder: Where it is.
        step: The optimizer step after which it was written.
        ranks: Number of ranks that wrote it.
        zero: Their ZeRO stage.
    """

    folder: Path
    step: int
    ranks: int
    zero: int

    @property
    def needs_conversion(self) -> bool:
        """Whether each rank wrote a part of the optimizer's state, and there are other numbers of ranks now."""
        return self.ranks != dist.get_world_size() and any(self.folder.glob("*_optim_states.pt"))


class Checkpoints:
    """The checkpoints of one stage and its engine; every rank calls the same methods at the same steps.

    A save costs the step a copy of the state into host memory. A thread on each rank writes the copy to
    `root/STAGE-STEP.tmp`; when all ranks have written, rank 0 notes sizes and checksums in `complete.json`, renames
    the folder, and removes all but the last `keep` of the stage.

    Frozen parameters are left out: they are in the model that the stage starts from.

    Raises:
        CheckpointError: from `agree`, `save` and `finish`, on all ranks, if one could not write; what was saved before
            stays.
    """

    def __init__(self, engine: Any, root: StrPath, stage: str, keep: int) -> None:
        self._engine, self._root, self._stage, self._keep = engine, Path(root), stage, keep
        self._frozen_names = {
            n for n, p in engine.module.named_parameters(remove_duplicate=False) if not p.requires_grad
        }
        # Memory of the last copy, by where in the state each tensor stands.
        self._copies: dict[tuple[Any, ...], torch.Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._tasks: list[Future[dict[str, Any] | None]] = []
        # The step whose files the tasks write; None when it is published, too.
        self._unpublished_step: int | None = None
        engine.checkpoint_engine.save = self._write  # DeepSpeed decides which state belongs in which file

    def resume(self, checkpoint: Checkpoint | None) -> int:
        """Load a checkpoint into the engine; returns the steps that it holds, 0 without one.

        Raises:
            CheckpointError: if it was written under a ZeRO stage that has its state in other files.
        """
        if checkpoint is None:
            return 0
        zero = self._engine.zero_optimization_stage()
        if checkpoint.zero != zero and {checkpoint.zero, zero} != {1, 2}:
            raise CheckpointError(
                f"{checkpoint.folder}: was written with zero {checkpoint.zero}, and zero {zero} cannot read it; finish "
                f"this stage with zero {checkpoint.zero} (the next one may have another), or remove {self._root} to "
                "start it from the beginning"
            )
        # What a checkpoint's groups must not change: names, learning rates, weight decay.
        settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self._engine.basic_optimizer.param_groups
        ]
        # Load it, converted if other ranks wrote it.
        convert = checkpoint.needs_conversion
        with _convert(checkpoint) if convert else contextlib.nullcontext(checkpoint.folder) as folder:
            path, state = self._engine.load_checkpoint(
                str(folder.parent), tag=folder.name, load_module_strict=False
            )
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed could not load it")
        # A universal checkpoint gives all groups the settings of the first, and ZeRO-3 one count of steps to share.
        optimizer = self._engine.basic_optimizer
        for group, setting in zip(optimizer.param_groups, settings, strict=True):
            group.update(setting)
        for moments in optimizer.state.values():
            moments["step"] = deepcopy(moments["step"])
        step = int(state["step"])
        if dist.get_rank() == 0:
            log.info("%s: resumed after step %d from %s", self._stage, step, checkpoint.folder)
        return step

    def save(self, step: int) -> None:
        """Copy the state after `step` and have it written; waits first for a copy that is still being written."""
        self.finish()
        tag = _temporary_path(self._folder(step)).name
        self._engine.save_checkpoint(
            str(self._root),
            tag=tag,
            save_latest=False,
            exclude_frozen_parameters=True,
            client_state={"step": step},
        )
        self._unpublished_step = step

    def agree(self, stop: bool = False) -> bool:
        """Whether any rank says `stop`; also makes a checkpoint count that all have written. Once per step."""
        # What this rank's thread is at, and then what the threads of all ranks are at.
        error = next((e for task in self._tasks if task.done() and (e := task.exception())), None)
        is_busy = any(not task.done() for task in self._tasks)
        is_stop_wanted, has_error, is_any_rank_busy = all_reduce_any(stop, error is not None, is_busy)
        if has_error:
            raise CheckpointError(
                f"could not save a checkpoint, the earlier ones stay: {error or 'another rank says why'}"
            )
        # All ranks have written their files: rank 0 may rename the folder.
        if not is_any_rank_busy:
            files, self._tasks = [task.result() for task in self._tasks], []
            if self._unpublished_step is not None:
                self._publish(self._unpublished_step, files)
                self._unpublished_step = None
        return is_stop_wanted

    def finish(self) -> None:
        """Wait until what has been saved counts."""
        # Once for the files of all ranks, once for rank 0 to publish them.
        for _ in range(2):
            wait(self._tasks)
            self.agree()

    def close(self) -> None:
        """Wait for the last save, and remove the stage's checkpoints; its result is in another folder."""
        self.finish()
        self._thread.shutdown()
        if dist.get_rank() == 0:
            for folder in _list_folders(self._root, self._stage):
                remove(folder)

    def _folder(self, step: int) -> Path:
        return self._root / f"{self._stage}-{step:08d}"

    def _write(self, state_dict: dict[str, Any], path: str) -> None:
        """Copy a file's state and have the thread write it, in place of DeepSpeed's `torch.save`."""
        # Frozen parameters are in the model that the stage starts from.
        state_dict = dict(state_dict)
        if "module" in state_dict:
            state_dict["module"] = {
                n: v for n, v in state_dict["module"].items() if n not in self._frozen_names
            }
        # The copy is complete before the next step changes what it is of.
        copy = self._copy(state_dict, (Path(path).name,), {})
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._tasks.append(self._thread.submit(_write_file, copy, Path(path)))

    def _copy(self, item: Any, key_path: tuple[Any, ...], copies: dict[Any, torch.Tensor]) -> Any:
        """A copy of `item` in host memory, in the memory of the copy before: new memory takes five times as long.

        Args:
            item: Tensors, in dictionaries, lists and tuples.
            key_path: The keys and indexes that lead to it.
            copies: Those of this save, by the memory that they are of, so that what is shared is copied once.
        """
        if isinstance(item, dict):
            return {key: self._copy(value, (*key_path, key), copies) for key, value in item.items()}
        if type(item) in (list, tuple):
            return type(item)(
                self._copy(value, (*key_path, index), copies) for index, value in enumerate(item)
            )
        if not torch.is_tensor(item):
            return item
        # A tensor: into the buffer of its place, unless the same memory has been copied.
        memory = (item.data_ptr(), item.shape, item.stride(), item.dtype)
        if memory not in copies:
            buffer = self._copies.get(key_path)
            if buffer is None or buffer.shape != item.shape or buffer.dtype != item.dtype:
                buffer = torch.empty(item.shape, dtype=item.dtype, pin_memory=item.is_cuda)
                self._copies[key_path] = buffer
            copies[memory] = buffer.copy_(item.detach(), non_blocking=True)
        return copies[memory]

    def _publish(self, step: int, files: list[dict[str, Any] | None]) -> None:
        """Make a folder that all ranks have finished writing the newest checkpoint, on the thread of rank 0."""
        files_of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(files_of_ranks, files)
        if dist.get_rank() != 0:
            return
        folder, zero = self._folder(step), self._engine.zero_optimization_stage()
        head = {
            "step": step,
            "ranks": len(files_of_ranks),
            "zero": zero,
            "files": [file for files_of_rank in files_of_ranks for file in files_of_rank],
        }

        # The list of files first, then the name that counts, then one checkpoint too many goes.
        def publish() -> None:
            write_json(_temporary_path(folder) / COMPLETE, head)
            remove(folder)
            _temporary_path(folder).rename(folder)
            fsync(self._root)
            for surplus in _list_folders(self._root, self._stage)[: -self._keep]:
                remove(surplus)

        self._tasks.append(self._thread.submit(publish))


def _temporary_path(folder: Path) -> Path:
    """Where a checkpoint is written or converted before it has its place."""
    return folder.with_name(folder.name + ".tmp")


class _HashWriter:
    """What `torch.save` writes to: bytes are hashed on their way, and every few MB are flushed to the disk.

    What is on the disk leaves the page cache, so that a file of any size goes through the same few pages: new ones are
    slow where a virtual machine must first be given them, and training would have to take what is left.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._buffer_bytes = file, 0
        self.checksum = xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        for start in range(0, len(data), FLUSH_BYTES):
            piece = data[start : start + FLUSH_BYTES]
            self.checksum.update(piece)
            self._file.write(piece)
            self._buffer_bytes += len(piece)
            if self._buffer_bytes >= FLUSH_BYTES:
                self.flush()
        return len(data)

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._buffer_bytes = 0


@contextlib.contextmanager
def _skip_crc32() -> Iterator[None]:
    """`torch.save` without the CRC-32 of each tensor, which takes as long as writing it, and which nobody reads."""
    option = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(option)


def _write_file(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write a file of a checkpoint; returns its name, size and checksum."""
    try:
        with path.open("wb") as file, _skip_crc32():
            writer = _HashWriter(file)
            torch.save(state, cast(BinaryIO, writer))
            writer.flush()
    except Exception as error:  # torch may put an error of its own over that of a full disk
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        free_bytes = shutil.disk_usage(path.parent).free
        raise CheckpointError(f"{path}: {reason}; {free_bytes / 1e6:,.0f} MB are free there") from error
    return {"name": path.name, "bytes": path.stat().st_size, "xxh3_128": writer.checksum.hexdigest()}


def find_newest(root: StrPath, stage: str) -> Checkpoint | None:
    """The newest complete checkpoint of a stage; a damaged one is passed over with a warning. All ranks call it.

    Each rank reads its share of the files to compare their checksums. Leftovers of interrupted saves are removed.
    """
    root, rank, ranks = Path(root), dist.get_rank(), dist.get_world_size()
    folders = [_list_folders(root, stage)]
    if rank == 0:
        for leftover in root.glob(f"{stage}-*.tmp"):
            remove(leftover)
    dist.broadcast_object_list(folders)
    # From the newest back, until one is undamaged on all ranks.
    for folder in reversed(folders[0]):
        damages: list[str | None] = [None] * ranks
        dist.all_gather_object(damages, _find_damage(folder, rank, ranks))
        damage = next(filter(None, damages), None)
        if damage is None:
            head = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
            return Checkpoint(folder, head["step"], head["ranks"], head["zero"])
        if rank == 0:
            log.warning("checkpoint %s is damaged (%s); looking for the one before it", folder, damage)
    return None


def _list_folders(root: Path, stage: str) -> list[Path]:
    """The complete checkpoints of a stage, the oldest first."""
    pattern = re.compile(re.escape(stage) + r"-\d{8}")
    return sorted(f for f in root.glob(f"{stage}-*") if pattern.fullmatch(f.name)) if root.is_dir() else []


def _find_damage(folder: Path, rank: int, ranks: int) -> str | None:
    """What is wrong with the files of a checkpoint, of which this rank reads its share."""
    try:
        head = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        files = [(file["name"], file["bytes"], file["xxh3_128"]) for file in head["files"]]
        int(head["step"]), int(head["ranks"]), int(head["zero"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{COMPLETE}: {error}"
    # This rank's share of the files.
    for name, size, checksum in files[rank::ranks]:
        file = folder / name
        try:
            if file.stat().st_size != size:
                return f"{name} is not {size} bytes long"
            with file.open("rb") as content:
                checksum_now = hashlib.file_digest(content, xxhash.xxh3_128).hexdigest()
            if checksum_now != checksum:
                return f"{name} does not have the checksum that it was written with"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


@contextlib.contextmanager
def _convert(checkpoint: Checkpoint) -> Iterator[Path]:
    """A copy of a checkpoint that any number of ranks can load, made by rank 0 and removed afterwards."""
    folder = _temporary_path(checkpoint.folder)
    message: list[str | None] = [None]
    if dist.get_rank() == 0:
        remove(folder)
        log.info(
            "%s: converting it from %d to %d ranks",
            checkpoint.folder,
            checkpoint.ranks,
            dist.get_world_size(),
        )
        try:
            _write_universal(checkpoint.folder, folder)
        except Exception as error:
            message = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(message)
    if message[0] is not None:
        raise CheckpointError(
            f"{checkpoint.folder}: could not be converted from {checkpoint.ranks} ranks ({message[0]}); "
            f"resume it on {checkpoint.ranks} ranks"
        )
    yield folder
    dist.barrier()
    if dist.get_rank() == 0:
        remove(folder)
        remove(folder.parent / "latest_universal")


def _write_universal(folder: Path, universal_folder: Path) -> None:
    """Convert a checkpoint's folder into DeepSpeed's universal format."""
    from deepspeed.checkpoint.ds_to_universal import main

    with Path(os.devnull).open("w") as sink, contextlib.redirect_stdout(sink):
        main(
            Namespace(
                input_folder=str(folder),
                output_folder=str(universal_folder),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
