"""Where commands may write: nothing is replaced but what the same kind of job made, and one job writes there at a time.

A command asks `check_folder` or `check_file` before it does any work, and takes the lock of its output before it
writes. What is refused is refused with `--overwrite` as well: that replaces outputs of other options, never anything
else.
"""

import fcntl
import json
import logging
import os
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from being_vl.errors import OutputError
from being_vl.files import MANIFEST, TEMPORARY, check_replaceable, list_names, name_write_errors, resolve_link
from being_vl.fingerprints import FINGERPRINT, write_fingerprint
from being_vl.names import show_name
from being_vl.options import StrPath

log = logging.getLogger(__name__)

LOCK = ".being-vl-lock"
"""Name of the file in a folder, and end of that beside a file, on which the job that writes there holds a lock."""

BYSTANDERS = re.compile(
    r"\.DS_Store|\.gitignore|\.gitkeep|\.keep|\.nfs[0-9a-f]+|Thumbs\.db|desktop\.ini|.*\.log|nohup\.out|slurm-.*\.(out|err)"
    rf"|\..+{re.escape(TEMPORARY)}|(\..+)?{re.escape(LOCK)}"
)
"""Names of files that do not make a folder count as used: of the system, logs, and what jobs leave when killed."""

_JOB_VARIABLES = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID")
"""Variables of the environment that tell the ranks of one job from those of another."""


def check_folder(
    folder: StrPath,
    *kinds: str,
    inputs: Iterable[StrPath | None] = (),
    is_own: Callable[[Path], bool] | None = None,
) -> bool:
    """Refuse a folder as a job's output unless it is new, empty, or holds the output of such a job.

    Args:
        folder: The output. A link to a folder stands for that folder.
        kinds: Of the manifest and the fingerprint that a job of this kind leaves.
        inputs: Folders and files that the job reads; the output must lie outside of them.
        is_own: Whether something in the folder is a part of such an output, although nothing else says so.

    Returns:
        Whether there is an output of these kinds, finished or not.

    Raises:
        OutputError: if it is refused.
    """
    path = resolve_link(folder)
    check_apart(path, inputs)
    if path.exists() and not path.is_dir():
        raise OutputError(f"{folder}: is no folder; expected a new or empty one for the output")
    _check_writable(path)
    if not path.is_dir():
        return False
    kinds_there = _find_kinds(path)
    if kinds_there and kinds_there <= {*kinds}:
        return True
    names = {entry.name for entry in path.iterdir() if not _is_bystander(entry)}
    foreign_names = {name for name in names if not (is_own and is_own(path / name))}
    if foreign_names:
        label = f", of another kind of job ({', '.join(sorted(kinds_there))})" if kinds_there else ""
        raise OutputError(
            f"{folder}: is not empty, but holds {list_names(foreign_names)}{label}; choose a new or an empty folder"
        )
    return bool(names)


def claim_folder(folder: StrPath, *kinds: str, inputs: Iterable[StrPath | None] = ()) -> None:
    """Check a folder as `check_folder` does, hold its lock, and mark it as the output of a job of the first kind.

    Raises:
        OutputError: if it is refused, or another process writes there.
    """
    check_folder(folder, *kinds, inputs=inputs)
    lock_folder(folder)
    if not (Path(folder) / FINGERPRINT).exists():
        write_fingerprint(Path(folder) / FINGERPRINT, {"kind": kinds[0]})


def check_file(
    path: StrPath, is_own: Callable[[Path], bool], what: str, inputs: Iterable[StrPath | None] = ()
) -> bool:
    """Refuse a path as a job's output unless there is nothing, or a file that such a job made.

    Args:
        path: The output. A link to a file stands for that file.
        is_own: Whether a file that is there is of this kind, by its content.
        what: What a file of this kind is called.
        inputs: Folders and files that the job reads; the output must lie outside of them.

    Returns:
        Whether there is a file of this kind.

    Raises:
        OutputError: if it is refused.
    """
    target = resolve_link(path)
    check_replaceable(target)
    check_apart(target, inputs)
    _check_writable(target)
    if not target.exists():
        return False
    if not is_own(target):
        raise OutputError(f"{path}: is there, and is no {what}; it is not overwritten, choose another name")
    return True


def check_apart(path: StrPath, inputs: Iterable[StrPath | None]) -> None:
    """Refuse an output that is an input, or lies in one that is a model, or the output of another job.

    Raises:
        OutputError: if it does.
    """
    target = Path(os.path.realpath(path))
    for item in inputs:
        if item is None or not Path(item).exists():
            continue
        source = Path(os.path.realpath(item))
        if target == source:
            raise OutputError(f"{path}: is the input, too; choose another place for the output")
        is_unit = any((source / name).is_file() for name in (MANIFEST, FINGERPRINT, "config.json"))
        if is_unit and source in target.parents:
            raise OutputError(f"{path}: lies in {item}, which is read; choose a place outside of it")


def check_only_files(folder: StrPath, pattern: str) -> None:
    """Refuse to remove a folder in an output if there is something in it that the job did not write.

    Args:
        folder: It may be missing.
        pattern: Of the names of the job's files in it, for `re`.

    Raises:
        OutputError: naming what else is there.
    """
    path = Path(folder)
    entries = path.iterdir() if path.is_dir() else ()
    if names := {e.name for e in entries if not re.fullmatch(pattern, e.name) and not _is_bystander(e)}:
        raise OutputError(
            f"{folder}: holds {list_names(names)}, which this job did not write; move that away"
        )


def _check_writable(path: Path) -> None:
    """Refuse a path that cannot be written, as far as can be told before."""
    place = path if path.is_dir() else next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir():
        raise OutputError(f"{path}: {place} is no folder, so nothing can be written there")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: the folder {place} cannot be written to")


def _find_kinds(folder: Path) -> set[str]:
    """The kinds that a folder's manifest and fingerprint name."""
    format_name = read_json(folder / MANIFEST).get("format")
    kind = read_json(folder / FINGERPRINT).get("kind")
    kinds = {kind} if isinstance(kind, str) else set()
    if isinstance(format_name, str) and format_name.startswith("being-vl/"):
        kinds.add(format_name.removeprefix("being-vl/"))
    return kinds


def read_json(path: StrPath) -> dict[str, Any]:
    """The object that a JSON file holds; empty if there is no such file, or it holds something else."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def is_empty(folder: StrPath) -> bool:
    """Whether a folder holds nothing but what does not count, such as a lock's file."""
    return all(_is_bystander(entry) for entry in Path(folder).iterdir())


def _is_bystander(path: Path) -> bool:
    """Whether something in a folder does not make it count as used."""
    if path.name == "lost+found":
        return True
    # A leftover of ours may be a folder as well.
    is_leftover = path.name.startswith(".") and path.name.endswith(TEMPORARY)
    return is_leftover or (BYSTANDERS.fullmatch(path.name) is not None and path.is_file())


class _Lock(NamedTuple):
    """A lock that this process holds: its file, and who may write."""

    file: TextIO
    process: int
    thread: int


_locks: dict[Path, _Lock] = {}
"""The locks of this process, by the paths of their files."""


def lock_folder(folder: StrPath) -> str:
    """Make a folder and hold its lock, until `unlock_folder`, the end of `free_locks`, or that of this process.

    The operating system frees the lock when the process ends, however it ends. On NFS it holds among all machines,
    where the server knows locks; where a file system knows none, there is a warning, and nothing is locked.

    Returns:
        What the lock's file says: the process, its machine, command and job.

    Raises:
        OutputError: if another process, or another thread, writes there.
    """
    folder = resolve_link(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return _lock(folder / LOCK, folder)


def lock_file(path: StrPath) -> str:
    """Hold the lock of a file, or of a folder that is replaced as a whole; its lock lies beside it.

    Raises:
        OutputError: as `lock_folder` does.
    """
    path = resolve_link(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return _lock(path.with_name(f".{path.name}{LOCK}"), path)


def unlock_folder(folder: StrPath) -> None:
    """Free the lock of a folder, if this process holds it."""
    _unlock(Path(os.path.realpath(folder)) / LOCK)


@contextmanager
def free_locks() -> Iterator[None]:
    """Free the locks that are taken inside; for a `with` statement, or as a decorator."""
    earlier_paths = {*_locks}
    try:
        yield
    finally:
        for path, lock in list(_locks.items()):
            if path not in earlier_paths and lock.thread == threading.get_ident():
                _unlock(path)


def _lock(path: Path, output: Path) -> str:
    """Take the lock of a file of locks, and write into it who holds it."""
    path = Path(os.path.realpath(path))
    lock = _locks.get(path)
    if lock is not None and (lock.process, lock.thread) == (os.getpid(), threading.get_ident()):
        return path.read_text(encoding="utf-8")
    holder = json.dumps(_describe_process())
    with name_write_errors(output):
        file = _open_locked(path, output)
        _locks[path] = _Lock(file, os.getpid(), threading.get_ident())
        try:
            file.truncate(0)
            file.write(holder)
            file.flush()
        except OSError:
            _unlock(path)
            raise
    return holder


def _open_locked(path: Path, output: Path) -> TextIO:
    """Open a lock's file with the lock held."""
    while True:
        file = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise OutputError(f"{output}: {_describe_holder(path)}") from None
        except OSError as error:
            log.warning(
                "%s: this file system knows no locks (%s); nobody else may write there", output, error
            )
            return file
        # Who held it before may have removed the file that was opened here.
        try:
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        file.close()


def _unlock(path: Path) -> None:
    """Remove a lock's file and free the lock, also for processes that were forked meanwhile."""
    lock = _locks.pop(path, None)
    if lock is None:
        return
    if lock.process == os.getpid():
        path.unlink(missing_ok=True)
        fcntl.flock(lock.file, fcntl.LOCK_UN)
    with suppress(OSError):  # what could not be written before cannot be written now
        lock.file.close()


def job_of_lock(folder: StrPath) -> str | None:
    """The job that holds a folder's lock, or that was killed while it held it; None if there is none."""
    job = read_json(resolve_link(folder) / LOCK).get("job")
    return job if isinstance(job, str) else None


def current_job() -> str:
    """What the ranks of one job have in common, and those of another have not."""
    return "/".join(os.environ.get(name, "") for name in _JOB_VARIABLES)


def _describe_process() -> dict[str, Any]:
    """Who holds a lock."""
    words = [Path(sys.argv[0]).name.replace("__main__.py", "being-vl"), *sys.argv[1:]]
    return {
        "process": os.getpid(),
        "machine": socket.gethostname(),
        "command": show_name(shlex.join(words)),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "time_ns": time.time_ns(),
        "job": current_job(),
    }


def _describe_holder(path: Path) -> str:
    """Who holds a lock, and what to do."""
    holder = read_json(path)
    who = "another process"
    if {"process", "machine", "command", "since"} <= holder.keys():
        who = (
            f"process {holder['process']} on {show_name(holder['machine'])} (`{show_name(holder['command'])}`, since "
            f"{holder['since']})"
        )
    return f"{who} is writing there; wait for it, end it, or choose another output"
