"""The card, or the CPU of a dry run, behind the same few calls; clocks; and how rows are measured.

The only file of this package that calls torch.cuda. A CPU has no allocator to ask: there, peaks are None.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu.sizes import CARD, TOY, Sizes

GIB = 2**30


class Device:
    """`torch_device` is where a row computes: `cuda:0`, or the CPU in a dry run, which is always of toy sizes."""

    def __init__(self, *, dry: bool, toy: bool = False):
        self.dry, self.toy = dry, dry or toy
        self.torch_device = torch.device("cpu") if dry else torch.device("cuda", 0)

    @property
    def name(self) -> str:
        return "CPU" if self.dry else torch.cuda.get_device_name(0)

    def start(self) -> None:
        """Create the CUDA context and the handle of its matrix library, so that no row pays for them."""
        # Toys are slower on several threads, and what a card waits for is never a product on the host.
        torch.set_num_threads(1)
        if not self.dry:
            torch.cuda.set_device(0)
        square = torch.ones(64, 64, device=self.torch_device, dtype=torch.bfloat16)
        (square @ square).sum().item()

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Return all memory that no tensor uses to the driver."""
        gc.collect()
        if not self.dry:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        if not self.dry:
            torch.cuda.reset_peak_memory_stats()

    def allocated(self) -> int | None:
        return None if self.dry else torch.cuda.memory_allocated()

    def peak(self) -> int | None:
        """The most bytes of tensors at once since `reset_peak`."""
        return None if self.dry else torch.cuda.max_memory_allocated()

    def reserved_peak(self) -> int | None:
        """The most bytes that the allocator took from the driver since `reset_peak`."""
        return None if self.dry else torch.cuda.max_memory_reserved()

    def retries(self) -> int | None:
        """How often an allocation succeeded only after cached memory had been given back."""
        return None if self.dry else int(torch.cuda.memory_stats().get("num_alloc_retries", 0))

    def capacity(self) -> int | None:
        return None if self.dry else torch.cuda.get_device_properties(0).total_memory

    def usable(self) -> bool:
        """Whether the device still computes: an illegal memory access, for one, ends a CUDA context for good."""
        try:
            self.free()
            return bool(torch.ones(8, device=self.torch_device).sum().item() == 8)
        except Exception:
            return False

    @staticmethod
    def out_of_memory(error: BaseException) -> bool:
        return isinstance(error, torch.OutOfMemoryError)


@dataclass(kw_only=True)
class Measured:
    """One side of a comparison: seconds of each run, and the most bytes above those before the run."""

    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    @property
    def gib(self) -> list[float]:
        return [peak / GIB for peak in self.peaks]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a row may know: where it computes, with which sizes, and until when."""

    device: Device
    until: float  # time.monotonic()

    @property
    def dry(self) -> bool:
        return self.device.dry

    @property
    def toy(self) -> bool:
        return self.device.toy

    @property
    def sizes(self) -> Sizes:
        return TOY if self.device.toy else CARD

    def left(self) -> float:
        """Seconds that this row still has."""
        return self.until - time.monotonic()

    def time(self, function: Callable[[], Any]) -> tuple[float, int | None]:
        """Return (seconds, peak bytes above what was allocated before) of one call, waiting for the device."""
        device = self.device
        device.synchronize()
        device.reset_peak()
        before, began = device.allocated(), time.perf_counter()
        function()
        device.synchronize()
        seconds, peak = time.perf_counter() - began, device.peak()
        return seconds, None if peak is None or before is None else peak - before

    def alternate(
        self, sides: Mapping[str, Callable[[], Any]], *, warm_up: int = 2, rounds: int | None = None, keep: float = 0.0
    ) -> dict[str, Measured]:
        """Run all sides in turn, round after round, and measure each run.

        The first `warm_up` rounds are not counted. Another round begins only if it should end `keep` seconds before
        the row has to.
        """
        found = {name: Measured() for name in sides}
        last = 0.0  # seconds of the round before
        warm_up = min(warm_up, 1) if self.toy else warm_up
        for number in range(warm_up + min(rounds or self.sizes.rounds, self.sizes.rounds)):
            counted = number >= warm_up
            if number > warm_up and self.left() - keep < 1.2 * last:
                break
            began = time.monotonic()
            for name, side in sides.items():
                seconds, peak = self.time(side)
                if counted:
                    found[name].seconds.append(seconds)
                    if peak is not None:
                        found[name].peaks.append(peak)
            last = time.monotonic() - began
        return found


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


@contextmanager
def deterministic() -> Iterator[None]:
    """Sums in one fixed order: the backward of FlashAttention, for one, else adds in the order in which blocks end.

    `CUBLAS_WORKSPACE_CONFIG` has to be set before CUDA starts; the runner does so.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
