"""The effect of SIGTERM, SIGUSR1 and Ctrl-C on a run: the first asks it to save and stop, a second ends it at once.

Schedulers send the first two before they kill. Python handlers run between two bytecodes of the main thread,
which may wait in a collective for minutes; so a second signal is seen by a thread, through the wake-up descriptor.
"""

import os
import signal
import socket
import threading
from types import FrameType, TracebackType
from typing import Any

from treering.core.errors import Interrupted

CAUGHT = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
UNWINDING = 2.0  # seconds that a second signal leaves for cleaning up


class Now(BaseException):
    """Raised by a handler. Not an Exception: libraries that catch everything must not catch this."""


class Signals:
    """Signal handlers during a run; those of the program are restored afterwards. In a thread other than the main one,
    Python allows no handlers, and those of the program stay."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.interrupted_by_thread = False  # ended by another rank's end
        self.at_once = True  # nothing to save yet: the first signal ends the run immediately
        self._before: dict[signal.Signals, Any] = {}
        self._over = threading.Event()

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._old_descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            for number in CAUGHT:
                # What the program ignores (nohup, a shell's background job) or handles below Python stays so.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._handle)
            threading.Thread(target=self._count, name="treering-signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._old_descriptor)
            self._writer.close()  # ends the thread
        if isinstance(error, Now):
            assert self.received is not None
            raise self.ended("there was nothing to save yet" if self.at_once else "at once") from None

    def ended(self, how: str) -> Interrupted:
        """Return the error that ends a run that was asked to stop."""
        error = Interrupted(f"stopped by {self.received.name if self.received else 'a signal to another rank'}: {how}")
        if self._second:
            error.exit_code = 128 + self._second
        return error

    _second = 0

    def interrupt_from_thread(self) -> None:
        """End the run from another thread, as a signal would, if it can end at once and the handlers are these."""
        if self.at_once and signal.SIGTERM in self._before and not self.interrupted_by_thread:
            self.interrupted_by_thread = True
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGTERM)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.interrupted_by_thread:
            raise Now
        if self.received is None:
            self.received = signal.Signals(number)
            if not self.at_once:
                return
        else:
            self._second = number
            if number == signal.SIGINT:
                raise KeyboardInterrupt
        raise Now

    def _count(self) -> None:
        seen = 0
        while numbers := self._reader.recv(16):
            for number in numbers:
                seen += number in self._before
                if seen == 2 and not self._over.wait(UNWINDING):
                    os._exit(128 + number)
        self._reader.close()
