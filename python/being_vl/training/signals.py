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

SIGNAL_WINDOW_S = 2.0
"""Seconds in which further signals count as the first: Slurm signals ranks, and the launcher, which passes it on."""

GRACE_PERIOD_S = 25.0
"""Seconds after SIGTERM to end a step and copy it: torchrun and Slurm send it when a rank is lost and kill after 30."""


class StopRequest:
    """Whether this process has been asked to stop.

    Attributes:
        signal: Name of the signal that asked; None if none has.
        agreement: Set when all ranks know that they stop, so that no rank waits for another one any more.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.agreement = threading.Event()

    def _listen(self, wakeups: socket.socket) -> None:
        """Read signals' numbers from a socket, until it is closed."""
        start = 0.0
        while data := wakeups.recv(1):
            number = data[0]
            if number not in SIGNALS:
                continue
            if self.signal is None:
                start, self.signal = time.monotonic(), signal.Signals(number).name
                log.warning("%s: stopping after this step; a second signal stops at once", self.signal)
                if number == signal.SIGTERM:
                    threading.Thread(target=self._end_after_grace_period, daemon=True).start()
            elif time.monotonic() - start > SIGNAL_WINDOW_S:
                log.warning("second signal: stopping at once")
                os._exit(128 + number)

    def _end_after_grace_period(self) -> None:
        if not self.agreement.wait(GRACE_PERIOD_S):
            log.error(
                "no step ended within %.0f s of SIGTERM: another rank is lost or hangs; ending",
                GRACE_PERIOD_S,
            )
            os._exit(128 + signal.SIGTERM)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While this lasts, a first signal is noted in what it yields, and a second ends the process; main thread only.

    A thread reads them, so that a second one counts even while the main thread waits for other ranks. Children that
    are forked meanwhile are ended by them as ever.
    """
    request = StopRequest()
    # Python writes the number of each signal into one end of a pair of sockets; the thread reads the other.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    descriptor = signal.set_wakeup_fd(writer.fileno())
    is_active = True

    def restore() -> None:
        signal.set_wakeup_fd(descriptor)
        for number, handler in handlers.items():
            signal.signal(number, handler)

    os.register_at_fork(after_in_child=lambda: restore() if is_active else None)
    threading.Thread(target=request._listen, args=(reader,), daemon=True).start()
    try:
        yield request
    finally:
        is_active = False
        restore()
        writer.close()


@contextlib.contextmanager
def forward_signals() -> Iterator[None]:
    """While this lasts, SIGTERM and SIGUSR1 go to the processes that this one has started and is waiting for."""
    import psutil

    def forward(number: int, _: FrameType | None) -> None:
        children = psutil.Process().children()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)
        if not children:
            raise SystemExit(128 + number)

    handlers = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
