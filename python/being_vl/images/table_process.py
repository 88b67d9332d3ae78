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
from contextlib import suppress
from pathlib import Path
from typing import Any

MEMORY = 4 << 30
"""Bytes that reading a part of a file may take beside eight times its size; less where the machine has less."""
SECONDS = 60.0
"""Processor time for reading a part of a file, beside a second for each ten million bytes of the file."""

EXIT_SECONDS = 5.0
"""How long a process that has closed its connection may take to end."""

Request = dict[str, Any]
Answer = dict[str, Any]


class TableProcess:
    """The process, `table_worker`, and the way to it.

    Attributes:
        request: The request that it has been sent and whose answer was not asked for yet, if there is one.
    """

    def __init__(self) -> None:
        self.request: Request | None = None
        self._memory = -1
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
        if self._receive_line() is None:
            raise RuntimeError(
                f"cannot start the process that reads tables ({sys.executable} {worker}); does it import pyarrow?"
            )

    def send(self, request: Request, file: int) -> None:
        """Have a request carried out, on the file of a descriptor."""
        self.request, self._memory = request, _new_memory()
        message = json.dumps(request).encode() + b"\n"
        # If it has died, that is what waiting for its answer shows.
        with suppress(OSError):
            sent = socket.send_fds(self._connection, [message], [file, self._memory])
            self._connection.sendall(message[sent:])

    def receive(self) -> tuple[Answer | None, mmap.mmap | None]:
        """The answer to the request, None if the process has died of it; and the memory that was filled, if any."""
        line = self._receive_line()
        with os.fdopen(self._memory, "rb") as memory:
            self.request, self._memory = None, -1
            size = os.fstat(memory.fileno()).st_size
            content = mmap.mmap(memory.fileno(), size) if size and line else None
        return (json.loads(line) if line else None), content

    def _receive_line(self) -> bytes | None:
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

    def close(self, seconds: float) -> int:
        """Let the process end within some seconds; returns its exit status."""
        self.leave()
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def leave(self) -> None:
        """Close this end of the connection."""
        self._connection.close()
        if self.request is not None:
            os.close(self._memory)
            self.request = None


_process: TableProcess | None = None
_lock = threading.Lock()


def read_in_process(
    path: Path, version: tuple[int, ...], request: Request, next_request: Request | None = None
) -> tuple[Answer, mmap.mmap | None]:
    """Have a file read.

    Args:
        path: The file.
        version: Its size and time of change, or empty if any will do.
        request: What `table_worker` is to do; limits and name are added.
        next_request: What it is to do then, while this process does something else: what is likely to be asked next.

    Returns:
        The answer, and the memory that was filled, if any.

    Raises:
        OSError: if the file is missing, no regular file, not of that version, or cannot be read; its `strerror` says
            why.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        # The file that is open is the one that is read.
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        if version and (status.st_size, status.st_mtime_ns) != version:
            raise OSError(errno.ESTALE, "changed while it was being read", str(path))
        name = f"{path.absolute()} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
        limits = {"bytes": _memory_limit(status.st_size), "seconds": SECONDS + status.st_size / 1e7}
        with _lock:
            answer, memory = _ask({"name": name, **limits, **request}, file)
            if _process is not None and next_request is not None:
                _process.send({"name": name, **limits, **next_request}, file)
    finally:
        os.close(file)
    if "error" in answer:
        reason = answer["error"]
        if reason == "memory":
            reason = f"reading it takes more than {limits['bytes'] / 1e9:.1f} GB of memory"
        part = "" if request.get("group") is None else f"row group {request['group']}: "
        raise OSError(errno.EBADMSG, f"{part}{' '.join(reason.split()):.300}", str(path))
    return answer, memory


def _ask(request: Request, file: int) -> tuple[Answer, mmap.mmap | None]:
    """The answer of the process, which is started if there is none; of its death, an `error`."""
    global _process
    # What it was to do meanwhile is of no use if it is something else, and no matter if it has died of it.
    if _process is not None and _process.request not in (None, request):
        answer, _ = _process.receive()
        if answer is None:
            _process.close(EXIT_SECONDS)
            _process = None
    if _process is None:
        _process = TableProcess()
    if _process.request is None:
        _process.send(request, file)
    answer, memory = _process.receive()
    if answer is not None:
        return answer, memory
    status = _process.close(EXIT_SECONDS)
    _process = None
    return {"error": _describe_end(status, request["seconds"])}, None


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
        _process.close(0)
        _process = None


def _forget_process() -> None:
    """In a fork: the process is the parent's, and a lock that another thread held would stay locked."""
    global _process, _lock
    _lock = threading.Lock()
    if _process is not None:
        _process.leave()
        _processes_of_parent.append(_process)
        _process = None


_processes_of_parent: list[TableProcess] = []
"""Kept, so that nothing waits for them: they are no children of this process."""

atexit.register(_end_process)
os.register_at_fork(after_in_child=_forget_process)
