"""SIGTERM and SIGUSR1, Slurm's warning: noted, so that training saves and ends after its step."""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ONE_EVENT = 2.0
"""Seconds in which further signals count as the first: Slurm signals ranks, and the launcher, which passes it on."""


PATIENCE = 25.0
"""Seconds after SIGTERM to end a step and copy it: torchrun and Slurm send it when a rank is lost and kill after 30."""


class StopRequest:
    """Whether this process has been asked to stop, by which signal, and whether all ranks have acted on it."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self.heard = threading.Event()

    def _listen(self, wakeups: socket.socket) -> None:
        first = 0.0
        while data := wakeups.recv(1):
            number = data[0]
            if number not in SIGNALS:
                continue
            if self.signal is None:
                first, self.signal = time.monotonic(), signal.Signals(number).name
                log.warning("%s: stopping after this step; a second signal stops at once", self.signal)
                if number == signal.SIGTERM:
                    threading.Thread(target=self._lose_patience, daemon=True).start()
            elif time.monotonic() - first > ONE_EVENT:
                log.warning("second signal: stopping at once")
                os._exit(128 + number)

    def _lose_patience(self) -> None:
        if not self.heard.wait(PATIENCE):
            log.error(
                "no step ended within %.0f s of SIGTERM: another rank is lost or hangs; ending", PATIENCE
            )
            os._exit(128 + signal.SIGTERM)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While this lasts, a first signal is noted in what it yields, and a second ends the process; main thread only.

    A thread reads them, so that a second one counts even while the main thread waits for other ranks. Children that
    are forked meanwhile are ended by them as ever.
    """
    request = StopRequest()
    wakeups, written = socket.socketpair()
    written.setblocking(False)
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    descriptor = signal.set_wakeup_fd(written.fileno())
    active = True

    def restore() -> None:
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)

    os.register_at_fork(after_in_child=lambda: restore() if active else None)
    threading.Thread(target=request._listen, args=(wakeups,), daemon=True).start()
    try:
        yield request
    finally:
        active = False
        restore()
        written.close()


@contextlib.contextmanager
def pass_on_signals() -> Iterator[None]:
    """While this lasts, SIGTERM and SIGUSR1 go to the processes that this one has started and is waiting for."""
    import psutil

    def pass_on(number: int, _: FrameType | None) -> None:
        children = psutil.Process().children()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)
        if not children:
            raise SystemExit(128 + number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
