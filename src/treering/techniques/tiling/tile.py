"""Run any token-wise function in tiles."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from treering.core.errors import PlanError
from treering.techniques.tiling.engine import Job, Out, run, run_now
from treering.techniques.tiling.lengths import bounds


@torch.compiler.disable
def tile(
    fn: Callable[..., Any],
    *tokens: Tensor,
    params: Sequence[Tensor] = (),
    size: int,
    out: Out = "cat",
    dims: int = 1,
    wide: bool = True,
) -> Any:
    """`fn(*tokens, *params)`, computed on at most `size` tokens at a time; exact for every function of single tokens.

    tokens   tensors that agree in their first `dims` dimensions, which count tokens; `fn` gets [t, …], or [1, t, …]
             where dims is 2
    params   every weight that `fn` reads and that may need a gradient. One that `fn` reads behind its back gets none
    out      cat: `fn` gives one row a token, and is run again in the backward
             sum: `fn` gives a number, whose gradient is taken at once; or a tuple of one and others that are only added
    wide     sum the gradients of `params` over tiles in float32; False: in the dtype of each
    """
    if not tokens or any(x.shape[:dims] != tokens[0].shape[:dims] for x in tokens):
        shapes = ", ".join(str(tuple(x.shape)) for x in tokens) or "none"
        raise PlanError(f"tile: tokens must agree in their first {dims} dimensions; they have the shapes {shapes}")
    lead = tokens[0].shape[:dims]
    cuts = bounds(lead.numel(), size)
    flat = len(cuts) > 1 and dims > 1
    if flat:
        tokens = tuple(x.reshape(-1, *x.shape[dims:]) for x in tokens)
    body = _checked(fn, len(tokens), dims if flat or dims == 1 else 0, out)
    cut = (True,) * len(tokens) + (False,) * len(params)
    laid_out = tuple(lead) if flat and out == "cat" else ()
    job = Job(body=body, bounds=cuts, tokens=len(tokens), cut=cut, out=out, wide=wide, lead=laid_out)
    return (run if out == "cat" else run_now)(job, *tokens, *params)


def _checked(fn: Callable[..., Any], tokens: int, dims: int, out: Out) -> Callable[..., Any]:
    """`fn` on rows of tokens. A result that is not one row a token would be cut somewhere else than it was made."""

    def body(*inputs: Tensor) -> Any:
        rows = inputs[0].shape[0]
        given = [x.reshape(*(1,) * (dims - 1), *x.shape) if dims > 1 else x for x in inputs[:tokens]]
        result = fn(*given, *inputs[tokens:])
        outputs = result if isinstance(result, tuple) else (result,)
        if out == "sum":
            if outputs[0].ndim:
                raise PlanError(f"tile: out is sum, and fn gave a tensor of shape {tuple(outputs[0].shape)}")
            return result
        if dims == 0:
            return result
        lead = (*(1,) * (dims - 1), rows)
        if any(tuple(y.shape[:dims]) != lead for y in outputs):
            raise PlanError(
                f"tile: fn got tokens of shape {lead} and gave {', '.join(str(tuple(y.shape)) for y in outputs)}; "
                "it must give one row a token"
            )
        outputs = tuple(y.reshape(rows, *y.shape[dims:]) for y in outputs)
        return outputs if isinstance(result, tuple) else outputs[0]

    return body
