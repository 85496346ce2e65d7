"""What of a call's arguments is tokens, so that a forward can be run on a tile of them."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from treering.core.errors import PlanError


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
