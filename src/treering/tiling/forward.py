"""Another forward for one instance, and back."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from treering.errors import PlanError


def replace(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Nothing else of the module changes: no name, no hook, no class. Returns what gives the former one back."""
    former = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]

    def restore() -> None:
        if former is None:
            del module.__dict__["forward"]
        else:
            module.forward = former  # type: ignore[method-assign]

    return restore


def undo_all(undone: Sequence[Callable[[], None]]) -> Callable[[], None]:
    def undo() -> None:
        for restore in reversed(undone):
            restore()

    return undo


def of_tokens(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], name: str, setting: str
) -> tuple[Callable[..., Any], list[Tensor], int]:
    """(a function of token tensors alone, these, how many of their first dimensions count tokens).

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
    words = {key: None if isinstance(value, Tensor) else value for key, value in kwargs.items()}

    def fn(*tiles: Tensor) -> Any:
        given, named = list(others), dict(words)
        for i, value in zip(places, tiles):
            given[i] = value
        named.update(zip(names, tiles[len(places) :]))
        return forward(*given, **named)

    return fn, tokens, dims
