"""Starts workers, limits their time, and writes each row to disk as it arrives. Imports no torch.

One worker runs all rows. A row that takes too long or ends its process is recorded as failed, and another worker goes
on with the rest. `--seconds` limits everything together: rows that were not begun by then are recorded as such.
"""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu import record
from benchmarks.gpu.catalogue import order, plan_of
from benchmarks.gpu.worker import MARK

ROOT = Path(__file__).parents[2]
STARTING = 120.0  # seconds for imports and the CUDA context
GRACE = 12.0  # seconds above a row's limit until its worker is ended
LEAST = 10.0  # seconds without which no row is begun


class Runner:
    """Measures `names` within `seconds`; `rows` is what `path` holds."""

    def __init__(
        self, names: Sequence[str], *, seconds: float, folder: Path, dry: bool, toy: bool = False, grace: float = GRACE
    ):
        self.names, self.folder, self.grace = list(names), folder, grace
        self.dry, self.toy = dry, dry or toy
        self.until = time.monotonic() + seconds
        self.device = "CPU" if dry else ""
        self.rows: list[dict[str, Any]] = []
        self.took: dict[str, float] = {}
        self.complete = True

    @property
    def path(self) -> Path:
        return self.folder / (f"gpu{'-dry' * self.toy}.{machine(self.device)}.json")

    def run(self) -> None:
        waiting = list(self.names)
        while waiting and self.left() > LEAST:
            waiting = self._work(waiting)
        for name in waiting:
            self.complete = False
            self._fail(name, "not begun: the time was used up")

    def left(self) -> float:
        return self.until - time.monotonic()

    def _work(self, waiting: list[str]) -> list[str]:
        """Run one worker until it ends or has to; returns the rows that are left."""
        worker = Worker(waiting, seconds=self.left(), dry=self.dry, toy=self.toy)
        open_row, began, limit = "", time.monotonic(), STARTING
        try:
            while True:
                patience = min(limit - (time.monotonic() - began), self.left())
                message = worker.next(max(0.0, patience))
                kind = "silent" if message is None else message["kind"]
                if kind == "hello":
                    self._hello(message["device"])
                elif kind == "begin":
                    if self.left() < LEAST:
                        return waiting
                    open_row, began = message["name"], time.monotonic()
                    limit = plan_of(open_row).seconds + self.grace
                elif kind == "row":
                    self._add(message["row"])
                elif kind == "end":
                    self.took[open_row] = time.monotonic() - began
                    waiting = [name for name in waiting if name != open_row]
                    open_row, began, limit = "", time.monotonic(), STARTING
                else:
                    return self._ended(worker, waiting, open_row, kind)
        finally:
            worker.stop()

    def _ended(self, worker: "Worker", waiting: list[str], open_row: str, kind: str) -> list[str]:
        if kind == "silent":
            why = "the time of the whole run was used up" if self.left() <= 0 else "it did not end within its limit"
        else:
            why = f"its process ended with exit code {worker.code()}: {worker.last_words()}"
        if open_row:
            self._fail(open_row, why)
        elif kind == "ended" and worker.code() in (0, 3):
            return waiting
        else:  # no row was open: a worker that cannot start will not start the next time either
            for name in waiting:
                self._fail(name, why)
            return []
        return [name for name in waiting if name != open_row]

    def _hello(self, device: str) -> None:
        self.device = device
        if not self.toy and not self.rows and self.path.exists():  # rows of an earlier run that are not measured again
            known = json.loads(self.path.read_text("utf-8"))
            self.rows = [one for one in known if one["row"] not in self.names]

    def _add(self, entry: dict[str, Any]) -> None:
        self.complete &= not entry["failed"]
        self.rows = sorted([*self.rows, entry], key=lambda one: order(one["row"]))
        record.save(self.path, self.rows)
        print(record.line(entry), flush=True)

    def _fail(self, name: str, message: str) -> None:
        command = f"python -m benchmarks.gpu --rows {name}"
        self._add(asdict(record.failed(name, message, device=self.device, dry=self.toy, command=command)))


class Worker:
    """A worker process in a group of its own, with what it starts."""

    def __init__(self, names: Sequence[str], *, seconds: float, dry: bool, toy: bool):
        options = ["--dry-run"] if dry else ["--toy"] if toy else []
        options = [*options, "--seconds", f"{seconds:.1f}"]
        command = [sys.executable, "-u", "-m", "benchmarks.gpu.worker", *options, *names]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=surroundings(dry), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self._messages: queue.Queue[dict[str, Any]] = queue.Queue()
        self._words = ""
        self._readers = [threading.Thread(target=t, daemon=True) for t in (self._read, self._listen)]
        for reader in self._readers:
            reader.start()

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next message; None if there was none in time. The last one has the kind `ended`.

        The end of the output would not do to see the process end: compilers that it started may hold the pipe open.
        """
        until = time.monotonic() + seconds
        while True:
            ended = self.process.poll() is not None
            try:
                return self._messages.get(timeout=max(0.0, min(0.5, until - time.monotonic())))
            except queue.Empty:
                if ended:
                    return {"kind": "ended"}
                if time.monotonic() >= until:
                    return None

    def code(self) -> int:
        return self.process.wait(timeout=10)

    def last_words(self) -> str:
        self._readers[1].join(timeout=2)
        return self._words

    def stop(self) -> None:
        """End the process and all that it started."""
        with suppress(ProcessLookupError):  # nobody of the group is left
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            if text.startswith(MARK):
                self._messages.put(json.loads(text.removeprefix(MARK)))
            else:
                sys.stderr.write(text)

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for text in self.process.stderr:
            self._words = text.strip() or self._words
            sys.stderr.write(text)


def surroundings(dry: bool) -> dict[str, str]:
    """The environment of a worker: our sources on its path, no network, sums in one order where a row asks for it.

    The workspace of cuBLAS has to be set for that; this is the size that Hopper cards have anyway. Process groups of
    one rank need an interface, and the loopback is there on a machine without a network as well.
    """
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "src"), *filter(None, [found.get("PYTHONPATH")])])
    found |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    found |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # somebody's launcher
        found.pop(name, None)
    if dry:
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found


def machine(device: str) -> str:
    """h100 for `NVIDIA H100 80GB HBM3`; otherwise the device's whole name, in letters and digits."""
    known = re.search(r"\b(H100|H200|A100|B200)\b", device)
    return known[1].lower() if known else re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "unknown"
