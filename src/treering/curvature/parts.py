"""Where the gradients of norms, routers and the token embedding are seen: weights that no linear layer multiplies.

Each is a matrix whose gradient is Σ_t g_t a_tᵀ as well:

    norm       y = x̂ ⊙ w + b      a = 1, g = g_y ⊙ x̂ (and g_y for b): one column; on heads, summed over the heads
    router     y = x Wᵀ, inside a forward that does more
    embedding  y = s ⊙ W[token]   a one-hot, which the tokens stand for; g = g_y ⊙ s

x̂ is the module's own function of its weight, f(x; 1) − f(x; 0): f is affine in w, of RMSNorm, LayerNorm and Gemma's
1 + w alike, so nothing has to be known of its kind.

R rows, D width, H heads.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from treering.core.errors import PlanError
from treering.core.module_forward import ModuleForward, beneath, install, installed
from treering.curvature.batch_tokens import BatchTokens, LayerRows
from treering.curvature.pairs import Capture, flat
from treering.technique import TileRows

if TYPE_CHECKING:
    from treering.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class SeenPart:
    """A parameter outside of linear layers and stacks of experts, whose gradient can be seen.

    Attributes:
        name: of the parameter.
        module: the module whose input and output show it.
        kind: how.
        outputs, inputs: N and M of its gradient.
    """

    name: str
    module: str
    kind: str  # norm, router or embedding
    outputs: int
    inputs: int


def parts_of(model: nn.Module, anatomy: "Anatomy") -> tuple[dict[str, SeenPart], dict[str, str]]:
    """Return the parts whose gradients can be seen, by parameter, and why each other one cannot."""
    linear = {name for one in anatomy.linears for name in (one.weight, one.bias)}
    stacked = {name for one in anatomy.experts for name in (*one.stacked, *one.biases)}
    tied = None if anatomy.head is None else anatomy.head.tied_to
    norms, reasons = set(anatomy.norms), dict[str, str]()
    parts: dict[str, SeenPart] = {}
    routers = {p.module for p in anatomy.with_role("router") if p.name not in linear and len(p.shape) == 2}
    for name, parameter in anatomy.parameters.items():
        if name in linear or name in stacked:
            continue
        module, leaf = model.get_submodule(parameter.module), name.rpartition(".")[2]
        kind = ""
        if name == tied:
            reasons[name] = "it is both embedding and head"
        elif parameter.module in norms and parameter.role == "norm" and leaf in ("weight", "bias"):
            if reason := _norm_problem(module, parameter.shape):
                reasons[name] = reason
            else:
                kind = "norm"
        elif parameter.module in routers and leaf in ("weight", "bias"):
            kind = "router"
        elif anatomy.embeddings and parameter.module == anatomy.embeddings[0] and len(parameter.shape) == 2:
            kind = "embedding"
        else:
            reasons[name] = f"it is no matrix of a layer, but of its own kind ({parameter.role})"
        if kind:
            outputs, inputs = _sizes(kind, parameter.shape)
            parts[name] = SeenPart(name=name, module=parameter.module, kind=kind, outputs=outputs, inputs=inputs)
    return parts, reasons


def see_parts(
    model: nn.Module, parts: Mapping[str, SeenPart], chosen: set[str], seen: Capture
) -> list[Callable[[], None]]:
    """Let `seen` see the parts among `chosen`. Returns the functions that remove what was installed."""
    by_module: dict[str, list[SeenPart]] = {}
    for name, part in parts.items():
        if name in chosen:
            by_module.setdefault(part.module, []).append(part)
    undo = []
    for fqn, several in by_module.items():
        module, kind = model.get_submodule(fqn), several[0].kind
        if kind == "router":
            undo.append(install(_SeenRouter(module, seen, [part.name for part in several])))
        else:
            make = _NormOutput if kind == "norm" else _EmbeddingOutput
            undo.append(see_output(module, make(seen, tuple(part.name for part in several)), lowest=True))
    return undo


def see_output(module: nn.Module, hook: Callable[..., Any], *, lowest: bool) -> Callable[[], None]:
    """Call `hook`, as a forward hook, with inputs and outputs of the module. Returns the undo.

    Args:
        lowest: beneath all forwards that replace the module's own, and not only those that return an objective: one
            that is deferred gives its output elsewhere.
    """
    top = installed(module)
    last: ModuleForward | None = None
    while isinstance(top, ModuleForward) and (lowest or top.returns_objective):
        last, top = top, beneath(top)
    if last is not None:
        return _SeenForward(module, last, hook).remove
    return module.register_forward_hook(hook, with_kwargs=True).remove


class _SeenForward(ModuleForward):
    """The output of a module, seen, beneath a forward that returns something else than the output."""

    def __init__(self, module: nn.Module, above: ModuleForward, hook: Callable[..., Any]):
        super().__init__(module)
        self.replaced, self.above, self.hook = above.replaced, above, hook
        above.replaced = self

    def __call__(self, x: Tensor) -> Tensor:
        return self.hook(self.module, (x,), {}, self.call_former(x))

    def remove(self) -> None:
        self.above.replaced = self.replaced


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the input of a module."""
    return args[0] if args else next(iter(kwargs.values()))


def rows_of_call(weight: str, count: int, batch: BatchTokens, tile: TileRows | None) -> LayerRows:
    """Return the rows of a layer that is called with `count` of them."""
    return batch.rows(weight, count, tile)


@dataclass(frozen=True)
class _NormOutput:
    """The hook of a norm. `names`: its weight, its bias, or both."""

    seen: Capture
    names: tuple[str, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> Any:
        x = first_input(args, kwargs)
        if not isinstance(x, Tensor) or self.seen.batch is None:
            return y
        swapped = x.ndim == 4 and _heads_before_tokens(x, self.seen.batch)
        count = y.numel() // y.shape[-1] // (1 if x.ndim != 4 else x.shape[1 if swapped else 2])
        made = partial(self._made, module, count, swapped)
        return self.seen.see_made(made, x, y, partial(rows_of_call, self.names[0], count))

    def _made(
        self, module: nn.Module, count: int, swapped: bool, x: Tensor, g: Tensor
    ) -> Sequence[tuple[str, Tensor, Tensor]]:
        ones = x.new_ones(count, 1, dtype=torch.promote_types(x.dtype, torch.float32))
        found = []
        for name in self.names:
            one = g.to(ones.dtype) if name.endswith(".bias") else g * normed(module, x)
            one = one.transpose(1, 2) if swapped else one
            found.append((name, ones, one.reshape(count, -1, one.shape[-1]).sum(1)))
        return found


def normed(module: nn.Module, x: Tensor) -> Tensor:
    """Return x̂, what the weight of a norm is multiplied with."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return _of_weight(module, x, 1.0) - _of_weight(module, x, 0.0)


def _of_weight(module: nn.Module, x: Tensor, value: float) -> Tensor:
    """Return the norm's function of x with a weight of equal elements. Its parameters, which may be sharded, its hooks
    and what replaces its forward are not touched."""
    probe = object.__new__(type(module))
    parameters = {n: None if p is None else x.new_full(p.shape, value) for n, p in module._parameters.items()}
    if parameters.get("bias") is not None:
        parameters["bias"] = torch.zeros_like(parameters["bias"])  # type: ignore[arg-type]
    probe.__dict__.update({**module.__dict__, "_parameters": parameters})
    probe.__dict__.pop("forward", None)
    return type(module).forward(probe, x)


def _norm_problem(module: nn.Module, shape: tuple[int, ...]) -> str:
    """Return why the weight of a norm cannot be seen, or ""."""
    needed = [p for p in inspect.signature(type(module).forward).parameters.values() if p.default is p.empty]
    others = set(module._parameters) - {"weight", "bias"}
    if len(needed) != 2 or others or len(shape) != 1:
        return "its norm has more than an input, a weight and a bias"
    x = torch.linspace(-1, 2, 2 * shape[0]).view(2, -1).cos()
    with torch.no_grad():
        zero, one, two = (_of_weight(module, x, value) for value in (0.0, 1.0, 2.0))
    if one.shape != x.shape or not torch.allclose(two + zero, 2 * one, rtol=1e-3, atol=1e-3):
        return "its norm is not linear in its weight"
    return ""


def _heads_before_tokens(x: Tensor, batch: BatchTokens) -> bool:
    """Return whether x, 4-dimensional, is [B, H, S, D] and not [B, S, H, D]: by its sizes or, where both are possible,
    by its strides, for the output of a linear layer has a token's heads next to each other."""
    one, two = (batch.has_order(x.shape[0] * x.shape[dimension]) for dimension in (1, 2))
    return two if one != two else x.stride(1) < x.stride(2)


class _SeenRouter(ModuleForward):
    """The forward of a router, in which the product with its weight is seen."""

    def __init__(self, module: nn.Module, seen: Capture, names: Sequence[str]):
        super().__init__(module)
        self.seen, self.names = seen, tuple(names)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.seen.batch is None or not torch.is_grad_enabled():
            return self.call_former(*args, **kwargs)
        with _SeenProduct(self) as product:
            result = self.call_former(*args, **kwargs)
        if product.count != 1:
            raise PlanError(
                f"{self.names[0]} is multiplied {product.count} times in one forward of its router, not once, so its "
                "gradient cannot be seen; set cover to blocks",
                settings=("collect.cover",),
            )
        return result


class _SeenProduct(TorchFunctionMode):
    """The products with a router's weight in one forward."""

    def __init__(self, forward: _SeenRouter):
        super().__init__()
        self.forward, self.count = forward, 0
        weight = forward.module._parameters["weight"]
        assert weight is not None
        self.shape = weight.shape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not F.linear or args[1].shape != self.shape:
            return result
        self.count += 1
        rows = partial(rows_of_call, self.forward.names[0], result.numel() // result.shape[-1])
        return self.forward.seen.see_made(self._made, args[0], result, rows)

    def _made(self, x: Tensor, g: Tensor) -> Sequence[tuple[str, Tensor, Tensor]]:
        x, g = flat(x.detach()), flat(g.detach())
        names = self.forward.names
        return [(name, x.new_ones(len(x), 1) if name.endswith(".bias") else x, g) for name in names]


@dataclass(frozen=True)
class _EmbeddingOutput:
    """The hook of the token embedding; its inputs are tokens."""

    seen: Capture
    names: tuple[str, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> Tensor:
        x = first_input(args, kwargs)
        rows = partial(rows_of_call, self.names[0], x.numel())
        return self.seen.see_made(partial(self._made, module), x, y, rows)

    def _made(self, module: nn.Module, x: Tensor, g: Tensor) -> Sequence[tuple[str, Tensor, Tensor]]:
        wide = g.to(torch.promote_types(g.dtype, torch.float32))
        g = flat(wide * self._scale(module, x, wide))
        padding = getattr(module, "padding_idx", None)
        if padding is not None:  # its embedding has no gradient
            g = g.masked_fill(x.reshape(-1, 1) == padding, 0)
        return [(self.names[0], x.reshape(-1, 1), g)]

    def _scale(self, module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
        """Return s, what the embeddings are multiplied with."""
        probe = object.__new__(type(module))
        parameters = {"weight": g.new_ones(1, g.shape[-1])}
        probe.__dict__.update({**module.__dict__, "_parameters": parameters, "padding_idx": None})
        probe.__dict__.pop("forward", None)
        return type(module).forward(probe, x.new_zeros(1))[0]


def _sizes(kind: str, shape: Sequence[int]) -> tuple[int, int]:
    """Return N and M of the gradient of a part."""
    if kind == "embedding":
        return shape[1], shape[0]
    return (shape[0], 1) if len(shape) == 1 else (shape[0], shape[1])
