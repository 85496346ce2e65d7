"""One block of each kind, called with fake tensors when a plan is made: a layout that is not known is found then, and
not at the first step, hours later."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import stateless

from treering.core.errors import PlanError
from treering.core.module_forward import installed
from treering.techniques.tiling.deferred import Deferred

if TYPE_CHECKING:
    from treering.anatomy import Anatomy

TOKENS = 4


class _Reached(Exception):
    """The model has called its first block."""


def try_blocks(model: Any, anatomy: "Anatomy") -> None:
    """Raise PlanError where a block does something with what its norms or its MLP give that cannot be deferred.

    A model whose own forward does not run with fake tensors is not tried: its first step raises the same error.
    """
    kinds = {_kind(model.get_submodule(block.fqn)): block.fqn for block in reversed(anatomy.blocks)}
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), fake, _fake_tensors(model):
        try:
            args, kwargs = _arguments(model, model.get_submodule(anatomy.blocks[0].fqn))
        except Exception:  # whatever a model's own code raises about fake tensors
            return
        for fqn in kinds.values():
            block: Any = model.get_submodule(fqn)
            try:
                out = block(*args, **kwargs)
            except PlanError:
                raise
            except Exception:
                continue
            first = out[0] if isinstance(out, tuple) else out
            if isinstance(first, Deferred):
                raise first.error("what a norm gives is the result of the block")


def _kind(block: nn.Module) -> Any:
    return tuple((name, type(module), type(installed(module))) for name, module in block.named_modules())


def _arguments(model: Any, first: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a forward of the model calls its first block with."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Reached

    handle = first.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)
    except _Reached:
        return seen[0]
    finally:
        handle.remove()
    raise AssertionError("a model calls its blocks")


@contextmanager
def _fake_tensors(model: nn.Module) -> Iterator[None]:
    """Give every parameter and buffer a fake tensor on the CPU in the place of its values."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values: dict[str, Tensor] = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in named.items()}
    with stateless._reparametrize_module(model, values, tie_weights=True):  # type: ignore[arg-type]
        yield
