"""Reading of files that others made, in a process whose end is an error that names the file.

There is one such process for each process that reads tables; it is started when it is needed, and again after it has
died of a file.
"""

import atexit
import errno
import json
import mmap
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

MEMORY = 4 << 30
"""Bytes that reading a part of a file may take beside eight times its size; less where the machine has less."""
SECONDS = 60.0
"""Processor time for reading a part of a file, beside a second for each ten million bytes of the file."""


class TableProcess:
    """The process, `table_worker`, and the way to it."""

    def __init__(self) -> None:
        self._connection, connection_of_process = socket.socketpair()
        with connection_of_process:
            number = connection_of_process.fileno()
            worker = Path(__file__).with_name("table_worker.py")
            # In a session of its own it gets no Ctrl-C; it ends when this end of the connection is closed.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(worker), str(number)],
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            )
        if self._receive() is None:
            raise RuntimeError(
                f"cannot start the process that reads tables ({sys.executable} {worker}); does it import pyarrow?"
            )

    def ask(self, request: dict[str, Any], descriptors: list[int]) -> dict[str, Any] | None:
        """The answer to a request; None if the process has died of it."""
        message = json.dumps(request).encode() + b"\n"
        try:
            sent = socket.send_fds(self._connection, [message], descriptors)
            self._connection.sendall(message[sent:])
        except OSError:
            return None
        answer = self._receive()
        return None if answer is None else json.loads(answer)

    def _receive(self) -> bytes | None:
        """A line; None if the process ends before it."""
        parts: list[bytes] = []
        while not parts or not parts[-1].endswith(b"\n"):
            try:
                part = self._connection.recv(1 << 16)
            except ConnectionError:
                part = b""
            if not part:
                return None
            parts.append(part)
        return b"".join(parts)

    def close(self) -> int:
        """End the process; returns its exit status."""
        self._connection.close()
        try:
            return self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def forget(self) -> None:
        """Leave the process to the parent that this one is a fork of."""
        self._connection.close()
        self._process.returncode = 0  # it is no child of this one


_process: TableProcess | None = None
_lock = threading.Lock()


def read_in_process(
    path: Path, version: tuple[int, ...], request: dict[str, Any]
) -> tuple[dict[str, Any], mmap.mmap | None]:
    """Have a file read.

    Args:
        path: The file.
        version: Its size and time of change, or empty if any will do.
        request: What `table_worker` is to do; limits and name are added.

    Returns:
        The answer, and the memory that was filled, if any.

    Raises:
        OSError: if the file is missing, no regular file, not of that version, or cannot be read; its `strerror` says
            why.
    """
    global _process
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    memory = _new_memory()
    try:
        # The file that is open is the one that is read.
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        if version and (status.st_size, status.st_mtime_ns) != version:
            raise OSError(errno.ESTALE, "changed while it was being read", str(path))
        limits = {"bytes": _memory_limit(status.st_size), "seconds": SECONDS + status.st_size / 1e7}
        name = f"{path.absolute()} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
        with _lock:
            if _process is None:
                _process = TableProcess()
            answer = _process.ask({"name": name, **limits, **request}, [file, memory])
            if answer is None:
                process, _process = _process, None
                answer = {"error": _describe_end(process.close(), limits["seconds"])}
        if "error" in answer:
            reason = answer["error"]
            if reason == "memory":
                reason = f"reading it takes more than {limits['bytes'] / 1e9:.1f} GB of memory"
            part = "" if request.get("group") is None else f"row group {request['group']}: "
            raise OSError(errno.EBADMSG, f"{part}{' '.join(reason.split()):.300}", str(path))
        size = os.fstat(memory).st_size
        return answer, mmap.mmap(memory, size) if size else None
    finally:
        os.close(file)
        os.close(memory)


def _new_memory() -> int:
    """Memory that two processes share, as the descriptor of a file without a name."""
    if sys.platform == "linux":
        return os.memfd_create("being-vl-table", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _memory_limit(file_size: int) -> int:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Files that are mapped count as well.
    return min(MEMORY + 8 * file_size, max(machine, MEMORY) + file_size)


def _describe_end(status: int, seconds: float) -> str:
    """Why the process has ended."""
    if status == -signal.SIGPROF:
        return f"damaged: reading it took more than {seconds:.0f} s of processor time"
    if status < 0:
        return f"damaged: its reader crashed ({signal.Signals(-status).name})"
    return f"damaged: its reader ended with status {status}"


def _end_process() -> None:
    global _process
    if _process is not None:
        _process.close()
        _process = None


def _forget_process() -> None:
    """In a fork: the process is the parent's, and a lock that another thread held would stay locked."""
    global _process, _lock
    _lock = threading.Lock()
    if _process is not None:
        _process.forget()
        _process = None


atexit.register(_end_process)
os.register_at_fork(after_in_child=_forget_process)
