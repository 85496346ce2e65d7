"""Replace the forward of one module instance, and restore it. No name, no hook and no class of the module changes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn


class ModuleForward:
    """A callable in place of one module's forward. A subclass defines `__call__`.

    An object that refers to its module, never a closure: `copy.deepcopy` and `pickle` take it along with the module, so
    that a copy of the model computes with the copy's weights. A closure would compute with the original weights.
    A subclass may refer to other modules only by attributes, for the same reason.

    Attributes:
        as_method: whether `__call__` is installed, bound to the object, in place of the object. torch.compile takes the
            methods of equal layers for one function, and compiles them once; objects, for each layer again. For
            layers that take one tensor: `inspect.signature` does not see the signature of what was replaced.
        again: whether the backward calls what was replaced again, with all messages that this sends.
        uncompiled: whether what was replaced is called from code that torch.compile leaves alone, and stays uncompiled
            with it.
        returns_objective: whether the call may return the value of an objective, in place of the module's output.
    """

    as_method: ClassVar[bool] = False
    uncompiled: ClassVar[bool] = False
    returns_objective: ClassVar[bool] = False
    again: bool = False

    def __init__(self, module: nn.Module):
        self.module = module
        self.replaced: Callable[..., Any] | None = module.__dict__.get("forward")  # None: that of the class

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def call_former(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward that was replaced."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def former(self) -> Callable[..., Any]:
        """The forward that was replaced. A new object each time: pickle writes a bound method as a look-up of
        `module.forward`, which would give this object instead."""
        return MethodType(type(self.module).forward, self.module) if self.replaced is None else self.replaced

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The forward that was replaced, for `inspect.signature`."""
        return self.former


class Switchable(Protocol):
    """Something that is added to an output, and left out while `off` is not 0."""

    off: int


class AddedForward(ModuleForward):
    """Return the output of a module plus that of `addend`, a child of the module, for the same input.

    The addend is called with the input and the module's output, and returns their sum: it can add while it multiplies.
    """

    as_method = True

    def __init__(self, module: nn.Module, addend: nn.Module):
        super().__init__(module)
        self.addend = addend
        self.off = 0  # number of `switched_off` contexts that are active

    def __call__(self, x: Tensor) -> Tensor:
        y = self.call_former(x)
        return y if self.off else self.addend(x, y)


@contextmanager
def switched_off(added: Sequence[Switchable]) -> Iterator[None]:
    """Compute without the addends of `added`, and without gradients.

    A forward with gradients would be wrong with recompute: its blocks run again in a backward after this context, when
    the addends are on again.
    """
    for forward in added:
        forward.off += 1
    try:
        with torch.no_grad():
            yield
    finally:
        for forward in added:
            forward.off -= 1


def installed(module: nn.Module) -> Any:
    """Return what replaces the module's forward: a ModuleForward, a callable of somebody else, or None."""
    forward = module.__dict__.get("forward")
    bound_to = getattr(forward, "__self__", None)
    return bound_to if isinstance(bound_to, ModuleForward) else forward


def beneath(forward: ModuleForward) -> Any:
    """Return what `forward` replaced: a ModuleForward, a callable of somebody else, or None for that of the class."""
    return getattr(forward.replaced, "__self__", forward.replaced)


def install(forward: ModuleForward) -> Callable[[], None]:
    """Replace the forward of `forward.module` by `forward`. Return a function that takes it out again, also from
    beneath what has replaced it since."""
    module = forward.module
    module.forward = forward.__call__ if forward.as_method else forward  # type: ignore[assignment, method-assign]
    return partial(remove, forward)


def remove(forward: ModuleForward) -> None:
    """Take `forward` out again, also from beneath what has replaced it since."""
    module, former = forward.module, forward.replaced
    above = installed(module)
    while isinstance(above, ModuleForward) and above is not forward:
        if beneath(above) is forward:
            above.replaced = former
            return
        above = beneath(above)
    if former is None:
        del module.__dict__["forward"]
    else:
        module.forward = former  # type: ignore[assignment, method-assign]


def undo_all(undone: Iterable[Callable[[], None]]) -> Callable[[], None]:
    """Return a function that calls all of `undone`, the last first. Called again, it does nothing."""
    left = list(undone)

    def undo() -> None:
        while left:
            left.pop()()

    return undo
