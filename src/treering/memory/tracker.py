"""A log of every storage, from the operator that allocates it until its last reference is gone, in the order of events.

It works for real and for fake tensors: a dispatch mode sees each operator, and a weak reference reports when a storage
is freed. FSDP frees and refills gathered parameters by resizing their storage, which is no operator: storages that were
allocated empty are compared again before each operator.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from treering.technique import tile_rows

ROUNDED = 512  # bytes: the caching allocators of accelerators allocate multiples of it

Category = Literal["parameters", "gathered", "gradients", "optimizer", "activations", "technique", "loss", "workspace"]
CATEGORIES: tuple[Category, ...] = (
    "parameters", "technique", "optimizer", "gradients", "gathered", "activations", "loss", "workspace",
)  # fmt: skip

_ASSUMED = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten.addmm.dtype_out,
}
# Messages of rows grow with the tokens, also where parts of them are rounded up to some bytes.
_ROWS = ("treering::all_to_all_rows", "treering::all_to_all_in_pairs", "treering::all_gather_rows")
_EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default}


@dataclass(slots=True)
class StorageRecord:
    """One storage. Where `category` is None, it follows from when the storage was allocated and freed."""

    host: bool
    elements: int
    exact: int  # bytes; `size` is rounded as allocators round
    size: int
    born: int  # the segment
    category: Category | None = None
    died: int | None = None
    rows: bool = False  # a message of rows of tokens


class Tracker(TorchDispatchMode):
    """Records `events`, (bytes, record, segment), in order. The function that runs the step sets `segment`."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.events: list[tuple[int, StorageRecord, int]] = []
        self.segment = 0
        self.begins = 0  # the first event of the step that is watched
        self.complete_tile = False  # whether a tile had all tokens: what it needs seems to grow with them
        self._live: dict[int, tuple[StorageRecord, weakref.ref[Any]]] = {}
        self._open: dict[int, StorageRecord] = {}  # allocated empty: their size may change
        # Resized to nothing: refilled just before something is copied there.
        self._closed: dict[int, StorageRecord] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rows = tile_rows()
        if rows is not None and rows.of_tokens and rows.stop - rows.start == rows.total:
            self.complete_tile = True
        self._look_again(self._open)
        if func is torch.ops.aten.copy_.default or func.namespace == "fsdp":
            self._look_again(self._closed)
        results = assumed(func, args, kwargs or {})
        if results is None:
            results = func(*args, **(kwargs or {}))
        if isinstance(results, Tensor):
            self._see(results, func)
        elif isinstance(results, list | tuple):
            for tensor in results:
                if isinstance(tensor, Tensor):
                    self._see(tensor, func)
        if func.namespace == "fsdp":
            self._mark_messages(func, args, kwargs or {})
        elif func._schema.name in _ROWS:
            for tensor in (args[0], results):
                self.record(tensor).rows = True
        return results

    def start(self) -> None:
        """Take the storages that exist now as those with which the step begins."""
        self.begins = len(self.events)

    def mark(self, tensors: Iterable[Tensor | None], category: Category) -> None:
        """Set the category of the storages of `tensors`, and record those that are new."""
        for tensor in tensors:
            if tensor is not None:
                self._see(tensor, None)
                self.record(tensor).category = category

    def record(self, tensor: Tensor) -> StorageRecord:
        """Return the record of the storage of `tensor`."""
        return self._live[_plain(tensor).untyped_storage()._cdata][0]

    def _see(self, tensor: Tensor, func: Any) -> None:
        storage = _plain(tensor).untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        exact = storage.nbytes()
        size, elements = _rounded(exact), exact // tensor.element_size()
        record = StorageRecord(
            host=tensor.device.type != self.device.type, elements=elements, exact=exact, size=size, born=self.segment
        )

        def freed(_: Any) -> None:
            del self._live[key]
            self._open.pop(key, None)
            self._closed.pop(key, None)
            record.died = self.segment
            self._change(record, -record.size)

        self._live[key] = record, weakref.ref(storage, freed)
        self.events.append((size, record, self.segment))
        if func in _EMPTY and not record.host:
            self._open[key] = record

    def _change(self, record: StorageRecord, by: int) -> None:
        self.events.append((by, record, self.segment))

    def _look_again(self, among: dict[int, StorageRecord]) -> None:
        for key, record in list(among.items()):
            entry = self._live.get(key)
            storage = entry[1]() if entry is not None else None
            if storage is None:
                continue
            exact = storage.nbytes()
            if exact == record.exact:
                continue
            record.exact, size = exact, _rounded(exact)
            if size != record.size:
                self._change(record, size - record.size)
                record.size, record.category = size, "gathered"
                del among[key]
                (self._open if size else self._closed)[key] = record

    def _mark_messages(self, func: Any, args: Any, kwargs: Any) -> None:
        """Set the categories of what goes into a message and comes out of one: operators of FSDP name both."""
        reduced = "chunk_cat" in func.name()
        for tensor in tree_leaves((args if reduced else args[1:], kwargs)):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device.type:
                self.mark([tensor], "gradients" if reduced else "gathered")


def assumed(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the values that a step reads and fake tensors do not have: each token is trained, and the norm of the
    gradient is finite. None for any other operator: a technique that reads other values cannot be planned."""
    if func not in _ASSUMED or not isinstance(args[0], FakeTensor):
        return None
    first = args[0]
    if func is torch.ops.aten.addmm.dtype_out:
        return kwargs["out"]  # fake tensors would make the product first; cards add inside of it
    if func is torch.ops.aten._grouped_mm.default:
        return _grouped(first, args[1], args[2] if len(args) > 2 else kwargs.get("offs"))
    if func is torch.ops.aten._local_scalar_dense.default:
        return 1.0 if first.dtype.is_floating_point else None
    if first.ndim == 1 and first.dtype == torch.bool:
        return first.new_empty(first.shape[0], 1, dtype=torch.long)
    return None


def _grouped(a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
    """Return the shape of products of groups of rows: torch's rule of shapes knows bfloat16 only, its kernels more."""
    if a.ndim == 2 and b.ndim == 2:
        assert ends is not None
        return a.new_empty(ends.shape[0], a.shape[0], b.shape[1])
    if a.ndim == 3 and b.ndim == 3:
        return a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return a.new_empty(a.shape[-2], b.shape[-1])


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rounded(size: int) -> int:
    return -(-size // ROUNDED) * ROUNDED
