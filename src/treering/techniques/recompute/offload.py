"""Inputs of blocks, off the device between forward and backward.

    forward of block i     its input starts to leave; that of block i − 1 has left, and its memory is free
    backward of block i    its input is back already; that of block i − 1, or of more before it, starts to come

The last block's input stays: it is needed at once. Who owns what follows the graph of autograd: a step that is aborted
drops its graph, and with it each `KeptInput`, which gives its host memory back. No list of them is kept.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from treering.core.errors import PlanError
from treering.techniques.recompute.copies import Copies, HostPool, Ticket, copies_for

SHORT = 16 * 2**20  # bytes of an input of which two are copied back ahead
ALIGNED = 64  # elements: kernels choose their order of summation by alignment, and a second forward must choose alike


class KeptInput:
    """One block's input: on the device, on its way, or in host memory."""

    def __init__(self, tensor: Tensor, block: str, before: "KeptInput | None", ahead: int = 1):
        self.tensor: Tensor | None = tensor
        self.version = tensor._version
        self.block, self.ahead = block, ahead
        self.before = weakref.ref(before) if before is not None else lambda: None
        self.engine: Offload | None = None  # of those that leave the device
        self.pieces: list[Tensor] = []
        self.ticket: Ticket | None = None  # of the copy that is running
        self.back = False  # whether `tensor` is a copy from the host
        self.layout = (tensor.shape, tensor.stride(), tensor.storage_offset() % ALIGNED, tensor.dtype, tensor.device)

    def send(self, engine: "Offload") -> None:
        assert self.tensor is not None
        self.engine = engine
        flat = _flat(self.tensor)
        self.pieces = engine.pool.take(flat.numel())
        pairs = [(piece[: len(part)], part) for piece, part in zip(self.pieces, flat.split(engine.pool.slab))]
        self.ticket = engine.copies_of(self.tensor.device).copy(pairs)

    def release(self) -> None:
        """Free the tensor on the device, once it has been copied."""
        if self.engine is None or self.tensor is None or self.back:
            return
        assert self.ticket is not None
        self.ticket.wait()
        self._check()
        self.tensor = self.ticket = None

    def fetch(self) -> None:
        """Start to copy it back, if it is not on the device."""
        if self.tensor is not None:
            return
        assert self.engine is not None
        shape, stride, offset, dtype, device = self.layout
        last = sum((n - 1) * s for n, s in zip(shape, stride))
        memory = torch.empty(offset + last + 1, dtype=dtype, device=device)
        self.tensor, self.back = memory.as_strided(shape, stride, offset), True
        flat = _flat(self.tensor)
        pairs = [(part, piece[: len(part)]) for piece, part in zip(self.pieces, flat.split(self.engine.pool.slab))]
        self.ticket = self.engine.copies_of(device).copy(pairs)

    def fetch_before(self) -> None:
        """Start to copy back the inputs of the blocks before, `ahead` of them."""
        one = self.before()
        for _ in range(self.ahead):
            if one is None:
                return
            one.fetch()
            one = one.before()

    def take(self) -> Tensor:
        """Return the input for a second forward. A copy from the host is not kept: another backward copies it again."""
        self.fetch()
        assert self.tensor is not None
        tensor = self.tensor
        if self.back:
            assert self.ticket is not None
            self.ticket.wait()
            self.tensor, self.ticket, self.back = None, None, False
        else:
            self._check()
        return tensor

    def _check(self) -> None:
        if self.tensor is not None and self.tensor._version != self.version:
            raise PlanError(
                f"recompute: the input of {self.block} was changed in place after it was kept, so the block cannot "
                "be run again from it; leave recompute out for this model",
                settings=("recompute",),
            )

    def __del__(self) -> None:
        if self.ticket is not None:  # the memory must not be used again while the copy runs
            self.ticket.wait()
        if self.engine is not None:
            self.engine.pool.give(self.pieces)


class Offload:
    """The choice of block inputs that leave the device, their copies in host memory, and when they are copied back."""

    def __init__(
        self,
        names: tuple[str, ...],
        first_blocks: int | None = None,
        budget: int | None = None,
        prefetch: int | None = None,
        copies: Callable[[torch.device], Copies] = copies_for,
        pool: HostPool | None = None,
    ):
        self.names = names
        self.leaving = min(len(names) - 1, len(names) if first_blocks is None else first_blocks)
        self.budget, self.prefetch = budget, prefetch
        self._copies_for, self._copies = copies, dict[torch.device, Copies]()
        self._pool = pool
        self._newest: weakref.ref[KeptInput] | None = None
        self.sent = 0  # number of tensors so far

    def __getstate__(self) -> dict[str, Any]:
        """Return settings for a copy of the model, and no memory: it allocates queues and buffers at its first use."""
        return vars(self) | {"_copies": {}, "_pool": None, "_newest": None, "sent": 0}

    @property
    def pool(self) -> HostPool:
        assert self._pool is not None
        return self._pool

    def copies_of(self, device: torch.device) -> Copies:
        if device not in self._copies:
            self._copies[device] = self._copies_for(device)
        if self._pool is None:
            self._pool = HostPool(self._copies[device].pinned)
        self._pool.limit = self.budget
        return self._copies[device]

    def around(self, index: int) -> saved_tensors_hooks:
        """Return the hooks under which torch's checkpoint of block `index` saves its input; inside are others."""
        return saved_tensors_hooks(partial(self._pack_if_filled, index), _unpack)

    def _pack_if_filled(self, index: int, tensor: Tensor) -> KeptInput | Tensor:
        """Apply `_pack`, unless `tensor` is empty: torch 2.11 saves an empty tensor next to the input."""
        return self._pack(index, tensor) if tensor.numel() else tensor

    def _pack(self, index: int, tensor: Tensor) -> KeptInput:
        if isinstance(tensor, DTensor):
            raise PlanError(
                f"recompute: the input of {self.names[index]} is a DTensor, and offload: cpu supports plain "
                "tensors; set recompute.offload to none",
                settings=("recompute.offload",),
            )
        before = None
        if self._newest is not None and index > 0:
            before = self._newest()
        if index == 0 and self.leaving:
            self.copies_of(tensor.device)
            self.pool.reserve(_flat(tensor).numel(), self.leaving)  # all at once, and not while blocks run
        short = tensor.numel() * tensor.element_size() <= SHORT
        kept = KeptInput(tensor, self.names[index], before, self.prefetch or (2 if short else 1))
        self._newest = weakref.ref(kept)
        if before is not None:
            before.release()
        if index < self.leaving and self._fits(tensor):
            self.sent += 1
            kept.send(self)
        return kept

    def _fits(self, tensor: Tensor) -> bool:
        self.copies_of(tensor.device)
        needed = sum(self.pool.sizes(_flat(tensor).numel()))
        return self.budget is None or self.pool.used + needed <= self.budget

    def metrics(self) -> dict[str, float]:
        return {"offloaded_gib": self._pool.allocated / 2**30 if self._pool is not None else 0.0}

    def clear(self) -> None:
        if self._pool is not None:
            self._pool.clear()


def _unpack(kept: KeptInput | Tensor) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    tensor = kept.take()
    kept.fetch_before()
    return tensor


def _flat(tensor: Tensor) -> Tensor:
    """Return the memory that a tensor spans, as bytes: one contiguous range, whatever the strides.

    It holds no more than the tensor's storage does, which a view that stays would keep.
    """
    tensor = tensor.detach()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    return tensor.as_strided((last + 1,), (1,), tensor.storage_offset()).view(torch.uint8)
