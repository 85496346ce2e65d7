"""The watchdog next to NCCL: it starts, writes heartbeats while collectives run, and ends without a trace.

With one rank the watchdog of a run starts nothing. Here it is made to watch a group of one, because two ranks of NCCL
cannot share a card.
"""

import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from benchmarks.gpu.device import Context
from benchmarks.gpu.record import Figure

TIMEOUT = 30.0
BEATS = 4


def rows(context: Context) -> Iterator[Figure]:
    import treering as tr
    from treering.core.topology import STARTUP
    from treering.train.ranks.heartbeat import BEAT, Board
    from treering.train.ranks.signals import Signals
    from treering.train.ranks.watchdog import Watchdog

    class OfOneRank(Watchdog):
        """Does what it would do among several ranks."""

        def __init__(self, timeout: float, signals: Signals):
            super().__init__(timeout, signals)
            self.several, self.rank, self.world = True, 0, 1
            self._group = dist.new_group(backend="gloo", timeout=STARTUP)
            self._board = Board("benchmark/", 0, 1)

    device = context.device.torch_device
    tr.mesh(device=device.type)
    number = torch.ones(1, device=device)
    signals = Signals()
    with signals, OfOneRank(TIMEOUT, signals) as watchdog:
        board = watchdog._board
        dist.all_reduce(number)
        watchdog.lower_timeouts()  # lowers the time limit of NCCL's group and gloo's
        first = (board.get("0") or {}).get("beat", 0)
        until = time.monotonic() + (BEATS + 2) * BEAT
        while time.monotonic() < until:
            watchdog.phase.begin(1)
            dist.all_reduce(number)
            time.sleep(BEAT / 10)
        with watchdog.usual_timeouts():
            dist.all_reduce(number)
        stop = watchdog.stop_asked()
        entry, watching = board.get("0") or {}, _threads()
        leaving = time.perf_counter()
    ended = time.perf_counter() - leaving
    deadline = time.monotonic() + 3 * BEAT
    while _threads() and time.monotonic() < deadline:
        time.sleep(BEAT / 10)
    done = bool((board.get("0") or {}).get("done"))
    backend = dist.get_backend()
    case = f"{backend}, one rank"
    yield Figure(
        figure="heartbeats while collectives run", case=case, ours=entry.get("beat", 0) - first, at_least=BEATS
    )
    yield Figure(figure="collectives that the heartbeat counts", case=case, ours=sum(entry.get("issued", {}).values()))
    ok = watching == 1 and not _threads() and done and not stop and board.end is None and float(number) == 1.0
    yield Figure(figure="ends cleanly: entry done, thread gone, nothing reported", case=case, ours=int(ok), at_least=1)
    yield Figure(figure="time to end", case=case, ours=ended, unit="s", at_most=1.0)


def _threads() -> int:
    return sum(thread.name == "treering-watchdog" for thread in threading.enumerate())
