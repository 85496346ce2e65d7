"""Which matrices an engine merges into one, so that they need one global scale of nvfp4, and its largest value.

Engines that serve a model merge q, k and v, and gate and up, into one product, and keep one global scale of it: with
several, they scale all but one of the parts wrongly.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from treering.technique import LazyTensor

if TYPE_CHECKING:
    from treering.anatomy.matrices import Matrix

MERGED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


def merged_groups(matrices: "Sequence[Matrix]") -> "list[list[Matrix]]":
    """Return the matrices of one module that engines merge, where there is more than one."""
    groups: dict[tuple[str, tuple[str, ...]], list[Matrix]] = {}
    for matrix in matrices:
        parent, _, name = matrix.module.rpartition(".")
        for names in MERGED:
            if matrix.experts is None and name in names:
                groups.setdefault((parent, names), []).append(matrix)
    return [group for group in groups.values() if len(group) > 1]


def largest_values(matrices: "Sequence[Matrix]", tensors: Mapping[str, LazyTensor]) -> dict[str, float]:
    """Return for each matrix that is merged the largest absolute value of its group. Reads these weights."""
    largest: dict[str, float] = {}
    for group in merged_groups(matrices):
        top = max(float(tensors[matrix.weight].read().abs().amax()) for matrix in group)
        largest |= {matrix.weight: top for matrix in group}
    return largest
