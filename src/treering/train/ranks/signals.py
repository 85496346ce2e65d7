"""The effect of SIGTERM, SIGUSR1 and Ctrl-C on a run: the first asks it to save and stop, a second ends it at once.

Schedulers send the first two before they kill. Python handlers run between two bytecodes of the main thread,
which may wait in a collective for minutes; so a second signal is seen by a thread, through the wake-up descriptor.

A launcher that is killed can send nothing. A rank that one has started looks twice a second whether it is still its
parent, and when it is not, saves and stops as after a signal. (Linux can send a signal at a parent's death, but sends
it when the thread that started the rank ends, and other systems cannot.)
"""

import os
import signal
import socket
import threading
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

from treering.core.errors import Interrupted

CAUGHT = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
UNWINDING = 2.0  # seconds that a second signal leaves for cleaning up
LAUNCHER = "TREERING_LAUNCHER"  # names the process that started this rank with --nproc
LOOK = 0.5  # seconds between two looks at the launcher


class Now(BaseException):
    """Raised by a handler. Not an Exception: libraries that catch everything must not catch this."""


class Signals:
    """Signal handlers during a run; those of the program are restored afterwards. In a thread other than the main one,
    Python allows no handlers, and those of the program stay."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.interrupted_by_thread = False  # ended by another rank's end
        self.orphaned = False  # the launcher is gone
        self.at_once = True  # nothing to save yet: the first signal ends the run immediately
        self._launcher = launcher_of(os.environ)
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
        if self._launcher is not None:
            threading.Thread(target=self._look, name="treering-launcher", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._old_descriptor)
            self._writer.close()  # ends the thread
        if isinstance(error, Now):
            raise self.ended("there was nothing to save yet" if self.at_once else "at once") from None

    @property
    def asked(self) -> bool:
        """Whether the run has to save and stop, for what happened to this rank."""
        return self.received is not None or self.orphaned

    @property
    def cause(self) -> str:
        """Why this rank stops, for messages."""
        if self.received is not None:
            return f"stopped by {self.received.name}"
        if self.orphaned or self._launcher not in (None, os.getppid()):  # another rank may have noticed first
            return "stopped because its launcher is gone"
        return "stopped by a signal to another rank"

    def ended(self, how: str) -> Interrupted:
        """Return the error that ends a run that was asked to stop."""
        error = Interrupted(f"{self.cause}: {how}")
        if self._second:
            error.exit_code = 128 + self._second
        return error

    _second = 0

    def interrupt_from_thread(self) -> None:
        """End the run from another thread, as a signal would, if it can end at once and the handlers are these."""
        if self.at_once and signal.SIGTERM in self._before and not self.interrupted_by_thread:
            self.interrupted_by_thread = True
            self._wake()

    def _wake(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGTERM)

    def _look(self) -> None:
        """Notice that the launcher is gone. Before there is anything to save, nothing need be waited for."""
        while not self._over.wait(LOOK):  # not at once: `__exit__` must be in force before anything is raised
            if os.getppid() != self._launcher:
                break
        else:
            return
        if not (self.at_once and signal.SIGTERM in self._before):
            self.orphaned = True
            return
        self._woken = self.orphaned = True
        self._wake()
        if not self._over.wait(UNWINDING) and self.at_once:  # it connects, loads or compiles, perhaps without end
            os.write(2, f"{self.ended('there was nothing to save yet')}\n".encode())
            os._exit(Interrupted.exit_code)

    _woken = False  # the next signal to the main thread is that of `_look`

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.interrupted_by_thread:
            raise Now
        if self._woken:
            self._woken = False
            if self.at_once:
                raise Now
            return
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


def launcher_of(environ: Mapping[str, str]) -> int | None:
    """Return the process that started this rank, if it is one of `treering train --nproc` or of torchrun."""
    number = environ.get(LAUNCHER, "")
    if number.isascii() and number.isdecimal() and "RANK" in environ:
        return int(number)  # even if it was gone before this process could look
    return os.getppid() if "TORCHELASTIC_RUN_ID" in environ else None
