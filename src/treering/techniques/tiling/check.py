"""Checks that a region can be run in tiles, once, at its first call: its structure, then its values on a few tokens.

A region that cannot would give wrong gradients without any message, so this is an error and no warning.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from treering.core.errors import PlanError
from treering.technique import recomputing
from treering.techniques.tiling.engine import Replay, as_tuple
from treering.techniques.tiling.products import Unread

SLICE = 32  # tokens that are computed both ways
COLLECTIVES = ("c10d", "_c10d_functional", "c10d_functional", "_dtensor", "fsdp")


class TileCheck:
    """The check of one region. `inspect` is called before each forward; all but the first cost nothing."""

    def __init__(self, name: str, modules: Sequence[nn.Module], setting: str):
        self.name, self.modules, self.setting = name, tuple(modules), setting
        self.done = False
        self.unread: frozenset[int] = frozenset()  # of the calls of F.linear: those whose results nothing reads

    def inspect(self, fn: Callable[..., Any], tokens: Sequence[Tensor], dims: int, out: str) -> None:
        if self.done or not self._real(tokens[0], dims):
            return
        self._refuse_units()
        self._compare(fn, [_few(x, dims) for x in tokens], dims, out)
        self.done = True

    def _real(self, x: Tensor, dims: int) -> bool:
        """Return whether there are values to compare: not while memory is predicted, not of a single token."""
        from torch._subclasses.fake_tensor import FakeTensor

        return not isinstance(x, FakeTensor) and x.device.type != "meta" and x.shape[:dims].numel() > 1

    def _refuse_units(self) -> None:
        for top in self.modules:
            for path, module in top.named_modules():
                if path and isinstance(module, FSDPModule):
                    raise self._error(
                        f"{path} inside it is an FSDP unit of its own, which would be gathered for each tile. Shard "
                        "complete blocks; an adapter gets its own unit where its dtype differs from that of the "
                        "arithmetic: set its dtype to base, or shard.compute to stored"
                    )
                for name, parameter in module._parameters.items():
                    if isinstance(parameter, DTensor):
                        raise self._error(f"{'.'.join(filter(None, (path, name)))} inside it is not gathered")

    def _compare(self, fn: Callable[..., Any], tokens: Sequence[Tensor], dims: int, out: str) -> None:
        half = tokens[0].shape[dims - 1] // 2
        buffers = [b for m in self.modules for b in m.buffers()]
        versions = [b._version for b in buffers]
        replay = Replay(tokens[0].device)
        cut = [x.split([half, x.shape[dims - 1] - half], dims - 1) for x in tokens]
        with torch.no_grad(), recomputing("tile"), _NoCollective(self._error), replay.again():
            before = torch.get_rng_state()
            with Unread() as found:
                results = as_tuple(fn(*tokens))
            self.unread, outputs = found.numbers(), tuple(y.as_subclass(Tensor) for y in results)
            random = not torch.equal(before, torch.get_rng_state()) or self._drops(tokens[0])
            halves = [as_tuple(fn(*(x[i] for x in cut))) for i in (0, 1)]
        if [b._version for b in buffers] != versions:
            raise self._error("its forward changes a buffer, which would happen once for each tile and pass")
        if random:
            return  # dropout: the two ways drop different elements
        for y, first, second in zip(outputs, *halves):
            both = first + second if out == "sum" else torch.cat([first, second], dims - 1)
            if both.shape != y.shape or not _close(both, y, replay):
                raise self._error(
                    "computed on two halves of some tokens it does not give what it gives on all of them, so what it "
                    "gives for one token depends on the others"
                )

    def _drops(self, x: Tensor) -> bool:
        """Return whether random numbers are drawn on a device whose state is not that of the host."""
        drops = (m for top in self.modules for m in top.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
        return x.device.type != "cpu" and any(m.training and m.p > 0 for m in drops)

    def _error(self, why: str) -> PlanError:
        message = f"{self.setting}: {self.name} cannot be run in tiles: {why}. Leave {self.setting} out"
        return PlanError(message, settings=(self.setting,))


class _NoCollective(TorchDispatchMode):
    def __init__(self, error: Callable[[str], PlanError]):
        super().__init__()
        self.error = error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in COLLECTIVES:
            raise self.error(
                f"it communicates with other ranks ({func.name()}), once for each tile; ranks with different numbers "
                "of tiles would wait for each other without end"
            )
        return func(*args, **(kwargs or {}))


def _few(x: Tensor, dims: int) -> Tensor:
    flat = x.detach().reshape(-1, *x.shape[dims:])[:SLICE]
    return flat.reshape(*(1,) * (dims - 1), *flat.shape)


def _close(value: Tensor, expected: Tensor, replay: Replay) -> bool:
    """Return whether results differ by less than √eps of the coarsest dtype in use times the largest element."""
    dtypes = [value.dtype, *(dtype for _, enabled, dtype in replay.autocast if enabled)]
    if not value.dtype.is_floating_point:
        return torch.equal(value, expected)
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    largest = expected.abs().max()
    if not bool(torch.isfinite(largest)):
        return True  # infinities cannot be compared; the step's guard sees them
    return bool(((value - expected).abs().max() <= eps**0.5 * largest).item())
