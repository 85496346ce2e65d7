"""Stacked experts a group at a time: each weight is seen by one group only, so its gradient is never a sum.

A group runs the module's own forward on a slice of every stacked parameter, as if there were no other experts. What a
router sends elsewhere gets the number that transformers reserves for "not here" (expert parallelism uses the same) and
weight 0.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from treering.core.errors import PlanError
from treering.core.module_forward import installed
from treering.experts.grouped_forward import GroupedForward
from treering.techniques.tiling.engine import run
from treering.techniques.tiling.tile import TiledRegion, bounds, put, slots
from treering.techniques.tiling.tile_job import TileJob

if TYPE_CHECKING:
    from treering.anatomy import Experts


# Before 5.18 only some forms of the experts skipped what is elsewhere, and grouped_mm left its rows uninitialized.
KNOWS_ELSEWHERE = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 18)


def check_groups(module: Any, experts: "Experts", setting: str) -> None:
    """Raise PlanError unless a slice of this module's parameters is a module of fewer experts."""
    unstacked = {name for name, p in module.named_parameters() if p.shape[:1] != (experts.number,)}
    known = getattr(module, "num_experts", None) == experts.number and hasattr(module, "_is_expert_parallel")
    eager = known and module.config._experts_implementation == "eager"
    source = "".join(inspect.getsource(inspect.unwrap(type(module).forward)).split()) if eager else ""
    what = (
        f"{sorted(unstacked)[0]} is not stacked over experts"
        if unstacked
        else "it is not written as transformers' own are"
    )
    if not unstacked and eager and "num_classes=self.num_experts)" in source:
        what = "its eager form has no number for experts that are elsewhere (experts_implementation grouped_mm has)"
        known = False
    if isinstance(installed(module), GroupedForward):
        what, known = "they have adapters", False
    if not unstacked and not KNOWS_ELSEWHERE:
        version = transformers.__version__
        what = f"transformers {version} has no number for experts that are elsewhere (5.18 and newer have)"
    if unstacked or not known:
        raise PlanError(
            f"{setting}: the experts {experts.fqn} cannot be run in groups: {what}. Set {setting}.experts to tokens",
            settings=(f"{setting}.experts",),
        )


def index_of(tokens: Sequence[Tensor], name: str, setting: str) -> Tensor:
    """Return, of the arguments of experts, the numbers of the experts of each token."""
    integers = [x for x in tokens[1:] if not x.dtype.is_floating_point]
    if len(integers) != 1 or len(tokens) != 3:
        shapes = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in tokens)
        raise PlanError(
            f"{setting}: {name} is called with {shapes}, not with tokens, the numbers of their experts and weights; "
            f"leave {setting} out",
            settings=(setting,),
        )
    return integers[0]


def call(
    module: Any,
    experts: "Experts",
    region: TiledRegion,
    fn: Callable[..., Tensor],
    tokens: Sequence[Tensor],
    dims: int,
    size: int,
    wide: bool,
) -> Tensor:
    """Return the experts' output, a group at a time. `size`: the tokens of a tile; groups are as many as such tiles."""
    region.check.inspect(fn, tokens, dims, "cat")
    tiles = len(bounds(tokens[0].shape[:dims].numel(), size))
    each = -(-experts.number // min(tiles, experts.number))
    trainable = slots([module])
    frozen = {
        p: [(module._parameters, n)] for n, p in module._parameters.items() if p is not None and p not in trainable
    }
    parameters = {**trainable, **frozen}
    which = next(i for i, x in enumerate(tokens) if not x.dtype.is_floating_point)

    def body(*inputs: Tensor) -> Tensor:
        arguments, values = list(inputs[: -len(parameters) - 1]), inputs[-len(parameters) - 1 : -1]
        numbers = inputs[-1]
        here = len(numbers)
        if here < experts.number:
            local = arguments[which] - numbers[0]
            inside = (local >= 0) & (local < here)
            arguments[which] = torch.where(inside, local, here)
            weight = 3 - which
            arguments[weight] = torch.where(inside, arguments[weight], 0)
        with put(parameters.values(), values), _fewer(module, here, experts.number):
            return fn(*arguments)

    numbers = torch.arange(experts.number, device=tokens[0].device)
    job = TileJob(
        body=body,
        bounds=bounds(experts.number, each),
        tokens=len(tokens),
        cut=(False,) * len(tokens) + (True,) * (len(parameters) + 1),
        out="sum",
        wide=wide,
    )
    return run(job, *tokens, *parameters, numbers)


@contextmanager
def _fewer(module: Any, here: int, number: int) -> Iterator[None]:
    if here == number:
        yield
        return
    before = module.num_experts, module._is_expert_parallel
    module.num_experts, module._is_expert_parallel = here, True
    try:
        yield
    finally:
        module.num_experts, module._is_expert_parallel = before
