"""Install forwards that run in tiles on the feed-forward parts of a model."""

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
    from treering.anatomy import Anatomy, Experts
    from treering.techniques.tiling.settings import Accumulate, TiledBlockSettings, TiledMLPSettings


def install_mlps(model: nn.Module, config: "TiledMLPSettings", site: Site) -> Applied:
    """Install tiles on every MLP and on every call of stacked experts."""
    anatomy = site.anatomy
    undone = [
        module_forward.install(_TiledMLP(model.get_submodule(fqn), config, fqn, token_width(anatomy, fqn)))
        for fqn in dense(model, anatomy)
    ]
    several = [tile_experts(model, config, anatomy, experts, "tiledmlp") for experts in anatomy.experts]
    return Applied(undo=module_forward.undo_all([*undone, *several]), notes=notes(config, len(undone), len(several)))


def notes(config: "TiledMLPSettings | TiledBlockSettings", dense: int, experts: int) -> tuple[str, ...]:
    """Return the lines for explain()."""
    long = f"of {config.budget:g} GiB" if config.tile == "budget" else f"of {config.tile} tokens"
    long = "of as many tokens as the model is wide" if config.tile == "hidden" else long
    lines = [f"{dense} MLPs in tiles {long}"] if dense else []
    if experts:
        by = f"in tiles {long}" if config.experts == "tokens" else "by groups of experts"
        lines.append(f"the experts of {experts} blocks {by}, routers outside")
    return tuple(lines)


def dense(model: nn.Module, anatomy: "Anatomy") -> list[str]:
    """Return the MLPs, and next to experts those that every token goes through."""
    names = []
    for block in anatomy.blocks:
        if block.mlp is None:
            continue
        stacked = tuple(e.fqn for e in anatomy.experts if e.fqn.startswith(f"{block.mlp}."))
        if not stacked and not any(e.fqn == block.mlp for e in anatomy.experts):
            names.append(block.mlp)
            continue
        children = (f"{block.mlp}.{name}" for name, _ in model.get_submodule(block.mlp).named_children())
        names += [fqn for fqn in children if fqn not in stacked and len(_outputs(anatomy, fqn)) > 1]
    return names


def _outputs(anatomy: "Anatomy", fqn: str) -> list[int]:
    return [x.outputs for x in anatomy.linears if x.role == "mlp" and x.fqn.startswith(f"{fqn}.")]


def token_width(anatomy: "Anatomy", fqn: str) -> int:
    """Return how many elements one token needs at the peak of its backward: each linear's output, what is computed
    from it, and a gradient. For a gated MLP of width I that is the 6 I of its well-known formula, and 3 H."""
    return 3 * sum(_outputs(anatomy, fqn))


def sums_wide(region: TiledRegion, accumulate: "Accumulate", budget: float) -> bool:
    """Return whether gradients of weights are summed over tiles in float32."""
    if accumulate == "budget":
        return 4 * sum(p.numel() for m in region.modules for p in m.parameters() if p.requires_grad) <= budget * GIB
    return accumulate == "float32"


class _TiledMLP(module_forward.ModuleForward):
    """The forward of an MLP, in tiles. `width`: elements that a token needs."""

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
    hidden = model.config.hidden_size  # type: ignore[union-attr]
    rows = sum(m.outputs if m.inputs == hidden else m.inputs for m in of_experts(anatomy, experts))
    if config.experts == "groups":
        groups.check_groups(module, experts, setting)
    return module_forward.install(_TiledExperts(module, config, experts, rows, setting))


class _TiledExperts(module_forward.ModuleForward):
    """The forward of stacked experts, in tiles. `rows`: elements that the weights of one expert compute for a token."""

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
        width = 3 * index.shape[-1] * (self.rows + x.shape[-1]) * x.element_size()
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
