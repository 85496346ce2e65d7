"""Install forwards that run in tiles on the feed-forward parts of a model."""

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from treering.anatomy.matrices import of_experts
from treering.core import module_forward
from treering.core.errors import PlanError
from treering.technique import Applied, Site
from treering.techniques.tiling import groups
from treering.techniques.tiling.tile import GIB, TiledRegion, tile_length

if TYPE_CHECKING:
    from treering.anatomy import Anatomy, Block, Experts
    from treering.techniques.tiling.settings import Accumulate, TiledBlockSettings, TiledMLPSettings


def install_mlps(model: nn.Module, config: "TiledMLPSettings", site: Site) -> Applied:
    """Install tiles on every MLP and on every call of stacked experts."""
    anatomy = site.anatomy
    whole, single = with_router(model, anatomy), dense(model, anatomy)
    undone = [
        module_forward.install(_TiledMLP(model.get_submodule(fqn), config, fqn, token_width(anatomy, fqn)))
        for fqn in single
    ]
    inside = [experts for experts in anatomy.experts if experts.fqn not in whole]
    undone += [tile_experts(model, config, anatomy, experts, "tiledmlp") for experts in inside]
    for experts in anatomy.experts:
        if experts.fqn in whole:
            fqn = whole[experts.fqn]
            width = token_width(anatomy, fqn) + 3 * experts.number * expert_rows(model, anatomy, experts)
            undone.append(module_forward.install(_TiledWhole(model.get_submodule(fqn), config, fqn, width)))
    lines = notes(config, len(single), len(inside), len(whole))
    return Applied(undo=module_forward.undo_all(undone), notes=lines)


def notes(config: "TiledMLPSettings | TiledBlockSettings", dense: int, experts: int, whole: int = 0) -> tuple[str, ...]:
    """Return the lines for explain()."""
    long = f"of {config.budget:g} GiB" if config.tile == "budget" else f"of {config.tile} tokens"
    long = "of as many tokens as the model is wide" if config.tile == "hidden" else long
    lines = [f"{dense} MLPs in tiles {long}"] if dense else []
    if experts:
        by = (
            f"in tiles {long}"
            if config.experts == "tokens"
            else "by groups of experts (each has the rows of all: tokens needs less)"
        )
        lines.append(f"the experts of {experts} blocks {by}, routers outside")
    if whole:
        lines.append(f"the experts of {whole} blocks in tiles {long}, routers inside")
    return tuple(lines)


def feed_forward(anatomy: "Anatomy", block: "Block") -> list[str]:
    """Return the feed-forward part of a block: one module, or several children of the block."""
    if block.mlp is not None:
        return [block.mlp]
    inside = [p.name for p in anatomy.parameters.values() if p.block == block.index and p.role in ("mlp", "experts")]
    return list(dict.fromkeys(f"{block.fqn}.{name.removeprefix(f'{block.fqn}.').partition('.')[0]}" for name in inside))


def with_router(model: nn.Module, anatomy: "Anatomy") -> dict[str, str]:
    """Return, of experts that are called with rows that are laid out by expert already, the module with their router.

    Of such rows there is no tile of tokens: the router, which lays them out, is computed in the tile as well. Each
    expert is given every token, as a row of zeros where it was not chosen.
    """
    whole = {}
    for experts in anatomy.experts:
        forward = type(model.get_submodule(experts.fqn)).forward
        named = [one for one in inspect.signature(forward).parameters.values() if one.kind == one.POSITIONAL_OR_KEYWORD]
        if len(named) == 2:  # itself and rows
            parts = feed_forward(anatomy, anatomy.blocks[experts.block])
            whole[experts.fqn] = next(part for part in parts if experts.fqn.startswith(f"{part}."))
    return whole


def dense(model: nn.Module, anatomy: "Anatomy") -> list[str]:
    """Return the MLPs, and next to experts those that every token goes through."""
    names, whole = [], with_router(model, anatomy).values()
    for part in (part for block in anatomy.blocks for part in feed_forward(anatomy, block)):
        module = model.get_submodule(part)
        stacked = tuple(e.fqn for e in anatomy.experts if e.fqn.startswith(f"{part}."))
        if part in whole or isinstance(module, nn.Linear):
            continue
        if not stacked and not any(e.fqn == part for e in anatomy.experts):
            names.append(part)
            continue
        children = (f"{part}.{name}" for name, _ in module.named_children())
        names += [fqn for fqn in children if fqn not in stacked and len(outputs_of(anatomy, fqn)) > 1]
    return names


def outputs_of(anatomy: "Anatomy", fqn: str) -> list[int]:
    """Return the widths of the outputs of the linears at or below `fqn`, those with a forward of their own included."""
    known = {x.weight: x.outputs for x in anatomy.linears}
    matrices = [p for p in anatomy.parameters.values() if len(p.shape) == 2 and p.role in ("mlp", "attention")]
    return [known.get(p.name, p.shape[0]) for p in matrices if p.name.startswith(f"{fqn}.")]


def token_width(anatomy: "Anatomy", fqn: str) -> int:
    """Return how many elements one token needs at the peak of its backward: each linear's output, what is computed
    from it, and a gradient. For a gated MLP of width I that is the 6 I of its well-known formula, and 3 H."""
    return 3 * sum(outputs_of(anatomy, fqn))


def expert_rows(model: nn.Module, anatomy: "Anatomy", experts: "Experts") -> int:
    """Return how many elements one expert computes for a token, its output included."""
    hidden: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
    return hidden + sum(m.outputs if m.inputs == hidden else m.inputs for m in of_experts(anatomy, experts))


def flat_rows(tokens: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return tokens as rows of one dimension, as a module that does so itself gives its outputs."""
    return tuple(x.reshape(-1, x.shape[-1]) for x in tokens)


def sums_wide(region: TiledRegion, accumulate: "Accumulate", budget: float) -> bool:
    """Return whether gradients of weights are summed over tiles in float32."""
    if accumulate == "budget":
        return 4 * sum(p.numel() for m in region.modules for p in m.parameters() if p.requires_grad) <= budget * GIB
    return accumulate == "float32"


class _TiledMLP(module_forward.ModuleForward):
    """The forward of an MLP, in tiles. `width`: elements that a token needs."""

    uncompiled = True
    setting = "tiledmlp"

    def __init__(self, module: nn.Module, config: "TiledMLPSettings", fqn: str, width: int):
        super().__init__(module)
        self.config, self.fqn, self.width = config, fqn, width
        self.region = TiledRegion(fqn, [module], self.setting)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        config = self.config
        fn, tokens, dims = _of_tokens(self.call_former, args, kwargs, self.fqn, self.setting)
        x = tokens[0]
        size = tile_length(config.tile, config.budget, self.width * x.element_size(), x.shape[-1])
        wide = sums_wide(self.region, config.accumulate, config.budget)
        return self.region(fn, *tokens, size=size, dims=dims, wide=wide)


class _TiledWhole(_TiledMLP):
    """The forward of an MLP whose router and experts are computed in tiles together."""

    def __call__(self, x: Tensor) -> Any:
        (rows,) = flat_rows([x])
        return super().__call__(rows)


def tile_experts(
    model: nn.Module,
    config: "TiledMLPSettings | TiledBlockSettings",
    anatomy: "Anatomy",
    experts: "Experts",
    setting: str,
) -> Callable[[], None]:
    """Install tiles on the call of stacked experts: tokens, their experts' numbers and weights are cut together. The
    router has seen all tokens before, so a loss on its output keeps its gradient."""
    module: Any = model.get_submodule(experts.fqn)
    if config.experts == "groups":
        groups.check_groups(module, experts, setting)
    rows = expert_rows(model, anatomy, experts)
    return module_forward.install(_TiledExperts(module, config, experts, rows, setting))


class _TiledExperts(module_forward.ModuleForward):
    """The forward of stacked experts, in tiles. `rows`: elements that one expert computes for a token."""

    uncompiled = True

    def __init__(
        self,
        module: nn.Module,
        config: "TiledMLPSettings | TiledBlockSettings",
        experts: "Experts",
        rows: int,
        setting: str,
    ):
        super().__init__(module)
        self.config, self.experts, self.rows, self.setting = config, experts, rows, setting
        self.region = TiledRegion(experts.fqn, [module], setting)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        config, experts, region = self.config, self.experts, self.region
        fn, tokens, dims = _of_tokens(self.call_former, args, kwargs, experts.fqn, self.setting)
        x, index = tokens[0], groups.index_of(tokens, experts.fqn, self.setting)
        width = 3 * index.shape[-1] * self.rows * x.element_size()
        size = tile_length(config.tile, config.budget, width, x.shape[-1])
        wide = sums_wide(region, config.accumulate, config.budget)
        if config.experts == "groups":
            return groups.call(self.module, experts, region, fn, tokens, dims, size, wide)
        return region(fn, *tokens, size=size, dims=dims, wide=wide)


def _of_tokens(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], name: str, setting: str
) -> tuple[Callable[..., Any], list[Tensor], int]:
    """Return (a function of token tensors alone, these, how many of their first dimensions count tokens).

    Every tensor among the arguments has to be one row a token, as the first is.
    """
    places = [i for i, value in enumerate(args) if isinstance(value, Tensor)]
    names = [key for key, value in kwargs.items() if isinstance(value, Tensor)]
    tokens = [*(args[i] for i in places), *(kwargs[key] for key in names)]
    if not tokens:
        raise PlanError(f"{setting}: {name} was called without a tensor; leave {setting} out", settings=(setting,))
    dims = tokens[0].ndim - 1
    if any(x.shape[:dims] != tokens[0].shape[:dims] for x in tokens):
        shapes = ", ".join(str(tuple(x.shape)) for x in tokens)
        raise PlanError(
            f"{setting}: {name} got tensors of the shapes {shapes}, and not each of them has one row a token; leave "
            f"{setting} out",
            settings=(setting,),
        )

    # Without the tensors: the graph keeps `fn`, and with it all that it refers to, until the backward.
    others = [None if isinstance(value, Tensor) else value for value in args]
    other_keywords = {key: None if isinstance(value, Tensor) else value for key, value in kwargs.items()}

    def fn(*tiles: Tensor) -> Any:
        arguments, keywords = list(others), dict(other_keywords)
        for i, value in zip(places, tiles):
            arguments[i] = value
        keywords.update(zip(names, tiles[len(places) :]))
        return forward(*arguments, **keywords)

    return fn, tokens, dims
