"""Patterns for names: `q_proj` is the end of a name, anything with a dot or a wildcard is a glob on the full name."""

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeVar

from treering.anatomy.parts import Anatomy, Linear, Parameter
from treering.core.errors import PlanError

if TYPE_CHECKING:
    from treering.anatomy.matrices import Matrix

_LEAVES = ("weight", "bias")
_Named = TypeVar("_Named", Linear, Parameter, "Matrix")


def matches(name: str, pattern: str) -> bool:
    """Return whether `pattern` names `name`, a module or a parameter.

    >>> matches("model.layers.0.self_attn.q_proj.weight", "q_proj")
    True
    >>> matches("model.layers.0.self_attn.q_proj", "model.layers.[02].*")
    True
    """
    if "." in pattern or any(sign in pattern for sign in "*?["):
        return fnmatchcase(name, pattern)
    return _last(name) == pattern or name.rpartition(".")[2] == pattern


def select(anatomy: Anatomy, patterns: str | Iterable[str]) -> tuple[Linear, ...]:
    """Return the linear layers that at least one pattern names, in the model's order. A pattern that names none is an
    error."""
    return _select(anatomy, anatomy.linears, patterns, lambda linear: (linear.fqn, linear.weight), "linear layer")


def select_matrices(anatomy: Anatomy, patterns: str | Iterable[str]) -> "tuple[Matrix, ...]":
    """Return the weights of linear layers and the stacks of experts that at least one pattern names, in the model's
    order. Experts are named by their parameter (`…experts.down_proj`)."""
    from treering.anatomy.matrices import of_experts, of_linear

    each = [of_linear(linear) for linear in anatomy.linears]
    each += [stack for experts in anatomy.experts for stack in of_experts(anatomy, experts)]
    order = {name: i for i, name in enumerate(anatomy.parameters)}
    each.sort(key=lambda matrix: order[matrix.weight])

    def names(matrix: "Matrix") -> tuple[str, ...]:
        return (matrix.weight,) if matrix.lead else (matrix.module, matrix.weight)

    return _select(anatomy, each, patterns, names, "linear layer and no stack of experts")


def select_parameters(anatomy: Anatomy, patterns: str | Iterable[str]) -> tuple[Parameter, ...]:
    """Return the parameters that at least one pattern names, by their own name or by their module's."""
    every = tuple(anatomy.parameters.values())
    return _select(anatomy, every, patterns, lambda parameter: (parameter.name, parameter.module), "parameter")


def _select(
    anatomy: Anatomy,
    things: Sequence[_Named],
    patterns: str | Iterable[str],
    names: Callable[[_Named], tuple[str, ...]],
    what: str,
) -> tuple[_Named, ...]:
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in patterns:
        if not any(matches(name, pattern) for thing in things for name in names(thing)):
            raise PlanError(_nothing(anatomy, pattern, [names(thing)[0] for thing in things], what))
    return tuple(thing for thing in things if any(matches(name, p) for name in names(thing) for p in patterns))


def _nothing(anatomy: Anatomy, pattern: str, names: Sequence[str], what: str) -> str:
    ends = Counter(map(_last, names))
    near = difflib.get_close_matches(pattern, ends, n=2, cutoff=0.6)
    if "." in pattern and any(fnmatchcase(name, f"*.{pattern}") for name in names):
        near = [f"*.{pattern}"]
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    known = ", ".join(f"{end} ({count})" for end, count in ends.items())
    first = f", e.g. {names[0]}" if names else ""
    return f"{pattern!r} matches no {what} of this {anatomy.model_type} model.{hint} There are: {known}{first}"


def _last(name: str) -> str:
    """Return the last component that distinguishes: for a weight or a bias, the module's."""
    head, _, leaf = name.rpartition(".")
    return head.rpartition(".")[2] if leaf in _LEAVES and head else leaf
