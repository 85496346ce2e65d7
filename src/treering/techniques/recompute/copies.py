"""A queue of copies next to the queue of computations, and the host memory that they fill.

`copy` puts copies into the queue, behind all that has been computed so far; the ticket's `wait` lets what is computed
from now on wait for them. The host does not wait. In between, source and target belong to the queue: code that frees
one, or writes to it, has to wait first.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from treering.core.errors import PlanError

SLAB = 32 * 2**20
LEAST = 4096
AT_ONCE = 2**30  # bytes that one allocation has at most, for several pieces

Pairs = Sequence[tuple[Tensor, Tensor]]  # (target, source)


class Ticket(Protocol):
    def wait(self) -> None: ...


class Copies(Protocol):
    pinned: bool  # whether host memory must be pinned for a copy to run at the same time as computations

    def copy(self, pairs: Pairs) -> Ticket: ...


def copies_for(device: torch.device) -> Copies:
    """Return a side stream on an accelerator; on a CPU a simulated queue, so that all else can be run and tested."""
    if device.type == "cpu":
        return SimulatedCopies()
    module = torch.get_device_module(device)
    if hasattr(module, "Stream"):
        return StreamCopies(module, device)
    raise PlanError(
        f"recompute: offload: cpu supports CUDA and XPU devices, and the model is on {device.type}; set "
        "offload to none",
        settings=("recompute.offload",),
    )


class StreamCopies:
    """One side stream for both directions: a host buffer that is read back and then filled again needs no other order.

    The stream of computations is asked for at each copy: a custom Function or FSDP may run a block on another one.
    """

    pinned = True

    def __init__(self, module: Any, device: torch.device):
        self.module, self.device = module, device
        self.side = module.Stream(device=device)

    def copy(self, pairs: Pairs) -> Ticket:
        here = self.module.current_stream(self.device)
        self.side.wait_stream(here)  # the source has been computed, the target is no longer in use
        with self.module.stream(self.side):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return _StreamTicket(self.module, self.device, here, self.side.record_event())


class _StreamTicket:
    def __init__(self, module: Any, device: torch.device, here: Any, done: Any):
        self.module, self.device, self.here, self.done = module, device, here, done

    def wait(self) -> None:
        """Make the current stream wait, and also the one that asked for the copy: it owns the memory."""
        now = self.module.current_stream(self.device)
        now.wait_event(self.done)
        if now != self.here:
            self.here.wait_event(self.done)


class SimulatedCopies:
    """Copies as late as a stream may: when this ticket or a later one is waited for, and not before.

    So a missing wait shows: as garbage where a tensor should have come back, as memory that was not freed.
    """

    pinned = False

    def __init__(self) -> None:
        self.waiting: deque[Pairs] = deque()
        self.asked = self.done = 0

    def copy(self, pairs: Pairs) -> Ticket:
        self.waiting.append(pairs)
        self.asked += 1
        return _SimulatedTicket(self, self.asked)

    def run_until(self, number: int) -> None:
        while self.done < number:
            for target, source in self.waiting.popleft():
                target.copy_(source)
            self.done += 1


class _SimulatedTicket:
    def __init__(self, copies: SimulatedCopies, number: int):
        self.copies, self.number = copies, number

    def wait(self) -> None:
        with torch.no_grad():
            self.copies.run_until(self.number)


class HostPool:
    """Host memory that is reused, in pieces. It is given back to the system by `clear`, and where `limit` bytes are
    allocated and a piece of another size is needed.

    Pinning memory costs milliseconds, so nothing is pinned per block or per step: `reserve` allocates what a forward
    will need before its first block runs. Lengths change from batch to batch,
    so buffers of a block's size would rarely fit the next batch: an input of any size is spread over slabs of one size,
    and only its end takes a piece of a power of two. torch's cache of pinned memory rounds complete buffers up to
    powers of two, which would waste up to half of it.
    """

    def __init__(self, pinned: bool, slab: int = SLAB):
        self.pinned, self.slab = pinned, slab
        self.limit: int | None = None
        self.allocated = 0  # bytes, used or waiting
        self.allocations = 0  # how often memory was asked for
        self.used = 0
        self._free: dict[int, list[Tensor]] = defaultdict(list)

    def sizes(self, wanted: int) -> list[int]:
        """Return the sizes of the pieces that hold `wanted` bytes."""
        slabs, rest = divmod(wanted, self.slab)
        return [self.slab] * slabs + ([max(LEAST, 1 << (rest - 1).bit_length())] if rest else [])

    def reserve(self, wanted: int, number: int) -> None:
        """Allocate what `number` inputs of `wanted` bytes will take and no waiting piece is there for.

        Where there is no limit, pieces share allocations of up to a GiB, powers of two of them, which torch's cache
        does not round up. With a limit each is one, so that it can be given back alone.
        """
        needed = Counter(self.sizes(wanted))
        if self.limit is not None:
            for size in self._free.keys() - needed.keys():
                self.allocated -= size * len(self._free.pop(size))
            each = sum(size * count for size, count in needed.items())
            number = min(number, (self.limit - self.used) // max(1, each))
        for size, count in needed.items():
            while (missing := count * number - len(self._free[size])) > 0:
                together = 1 if self.limit is not None else min(1 << (missing.bit_length() - 1), AT_ONCE // size)
                self._free[size] += self._new(size, max(1, together))

    def take(self, wanted: int) -> list[Tensor]:
        """Return one-dimensional tensors of bytes, together at least `wanted` long."""
        pieces = []
        for size in self.sizes(wanted):
            pieces.append(self._free[size].pop() if self._free[size] else self._new(size)[0])
            self.used += size
        return pieces

    def give(self, pieces: list[Tensor]) -> None:
        for piece in pieces:
            self.used -= piece.numel()
            self._free[piece.numel()].append(piece)

    def clear(self) -> None:
        self.allocated -= sum(piece.numel() for pieces in self._free.values() for piece in pieces)
        self._free.clear()

    def _free_for(self, size: int) -> None:
        """Give pieces that wait back to the system, the largest first, until `size` more bytes are within the limit."""
        if self.limit is None or self.allocated + size <= self.limit:
            return
        for other in sorted(self._free, reverse=True):
            while self._free[other] and self.allocated + size > self.limit:
                self._free[other].pop()
                self.allocated -= other
        if self.pinned and hasattr(torch.accelerator, "empty_host_cache"):
            torch.accelerator.empty_host_cache()  # torch would keep them, for the same size only

    def _new(self, size: int, number: int = 1) -> list[Tensor]:
        """Return so many new pieces of one allocation."""
        self._free_for(size)
        try:
            memory = torch.empty(size * number, dtype=torch.uint8, device="cpu", pin_memory=self.pinned)
        except (RuntimeError, MemoryError) as error:
            raise PlanError(
                f"recompute: {self.allocated / 2**30:.1f} GiB of host memory hold block inputs, and no more is left "
                f"({str(error).splitlines()[0]}). Set recompute.budget below that, or offload the first_blocks only",
                settings=("recompute.offload",),
            ) from error
        self.allocated += size * number
        self.allocations += 1
        return list(memory.split(size))
