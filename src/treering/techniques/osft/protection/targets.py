"""The weights that `osft` protects, and how many directions of each are trainable: by ratio, spectrum or importance."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from treering.anatomy import Anatomy, matches, select_parameters
from treering.anatomy.matrices import Matrix, all_linear, matrices
from treering.core.collectives import gather_objects
from treering.core.errors import PlanError
from treering.core.owners import assign
from treering.techniques.osft.protection.decompose import finite, moment, svd

if TYPE_CHECKING:
    from treering.techniques.osft.settings import OSFTSettings

OF_WEIGHTS, OF_INPUTS, OF_MERGED = 0.25, 0.5, 0.375  # the trainable ratio where the user writes none

_Settings = TypeVar("_Settings", bound="OSFTSettings")


# --- which weights


def targets(config: "OSFTSettings", anatomy: Anatomy) -> tuple[Matrix, ...]:
    """Return the protected weights, in the model's order. Patterns match the weight's name or its module's."""
    if config.targets == "all-linear":
        chosen = list(all_linear(anatomy))
    else:
        known = {matrix.weight: matrix for matrix in matrices(anatomy)}
        chosen = []
        for parameter in select_parameters(anatomy, config.targets):
            if parameter.name in known:
                chosen.append(known[parameter.name])
            elif len(parameter.shape) > 1:
                raise PlanError(
                    f"osft: {parameter.name} ({parameter.role}) is not a linear layer; leave it out of osft.targets, "
                    "or train it without protection with osft.train",
                    settings=("techniques.osft.targets",),
                )
    if not chosen:
        raise PlanError(
            f"osft: no weight of this {anatomy.model_type} model is a target; see osft.targets",
            settings=("techniques.osft.targets",),
        )
    return tuple(chosen)


def unprotected(config: "OSFTSettings", anatomy: Anatomy, chosen: Sequence[Matrix]) -> tuple[str, ...]:
    """Return the names of the parameters that `train` makes trainable without protection."""
    if not config.train:
        return ()
    protected = {matrix.weight for matrix in chosen}
    return tuple(p.name for p in select_parameters(anatomy, config.train) if p.name not in protected)


# --- how many directions


def trainable(config: "OSFTSettings", matrix: Matrix) -> int:
    """Return the number of trainable directions: ⌊ratio · all⌋, unless `resolve` counted them."""
    if matrix.weight in config.free:
        return config.free[matrix.weight]
    ratio = written_ratio(config, matrix)
    if ratio is None:
        of_inputs = OF_MERGED if config.chosen_form == "merged" else OF_INPUTS
        ratio = OF_WEIGHTS if config.protect == "weights" else of_inputs
    return floor(ratio, directions(config, matrix))


def floor(ratio: float, number: int) -> int:
    """Return ⌊ratio · number⌋; 0.1 · 30 is 3, although its binary fraction is smaller."""
    return int(ratio * number + 1e-9)


def written_ratio(config: "OSFTSettings", matrix: Matrix) -> float | None:
    """Return the ratio that the user wrote for `matrix`; None where there is none."""
    ratio = config.ratio
    for pattern, value in config.ratios.items():
        if matches(matrix.weight, pattern) or matches(matrix.module, pattern):
            ratio = value
    return ratio


def soft_everywhere(config: "OSFTSettings", matrix: Matrix) -> bool:
    """Return whether every direction is protected by its own use: soft protection without a number of directions."""
    softly = config.strength == "soft" and config.protect != "weights" and config.chosen_form == "update"
    return softly and written_ratio(config, matrix) is None and matrix.weight not in config.free


def directions(config: "OSFTSettings", matrix: Matrix) -> int:
    """Return the number of directions to choose from: singular ones, or those of the inputs."""
    return matrix.rank if config.protect == "weights" else matrix.inputs


# --- numbers that depend on values (`rank: energy`, `rank: importance`)


def resolved(config: "_Settings", anatomy: Anatomy, source: Any, statistics: Any) -> "_Settings":
    """Return `config` with the numbers of trainable directions in `free`. A collective; the same on all ranks."""
    chosen = targets(config, anatomy)
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    owners = assign({matrix.weight: float(matrix.rank * matrix.numel) for matrix in chosen}, world)
    measure = _kept_by_energy if config.rank == "energy" else _turning
    measured = {
        matrix.weight: measure(config, matrix, source, (statistics or {}).get(matrix.weight))
        for matrix in chosen
        if owners[matrix.weight] == rank
    }
    values = {name: value for part in gather_objects(measured) for name, value in part.items()}
    if config.rank == "importance":
        values = _kept_by_importance(config, chosen, values)
    return replace(config, free={m.weight: directions(config, m) - int(values[m.weight]) for m in chosen})


def _kept_by_energy(
    config: "OSFTSettings", matrix: Matrix, source: Any, statistics: Mapping[str, Tensor] | None
) -> float:
    """Return the fewest directions that hold `energy` of the spectrum; of experts, of the one that needs most."""
    if config.protect == "weights":
        W = finite(source.tensors[matrix.weight].read(), matrix)
        energy = torch.linalg.svdvals(W.to(torch.promote_types(W.dtype, torch.float32))).double().square()
    else:
        energy = torch.linalg.eigvalsh(moment(matrix, statistics).double()).flip(-1).clamp_min(0)
    share = energy.cumsum(-1) / energy.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    # Rounding may leave the last share slightly under 1, although it contains all directions.
    needed = (share < min(config.energy, 1 - 1e-12)).sum(-1) + 1
    # An expert that saw no token needs no direction.
    needed = torch.where(energy.sum(-1) > 0, needed, torch.zeros_like(needed))
    return float(needed.clamp(max=directions(config, matrix)).max())


def _turning(config: "OSFTSettings", matrix: Matrix, source: Any, statistics: Mapping[str, Tensor] | None) -> float:
    """Return the paper's importance, the mean cosine of x and W x, as a ratio of means over the measured inputs.

    Where inputs and outputs differ in number, x cannot be compared with W x; T x can, with T = U Vᵀ the nearest
    isometry, and T is what W does besides stretching.
    """
    W = matrix.oriented(finite(source.tensors[matrix.weight].read(), matrix).double())
    A = moment(matrix, statistics).double()
    out = (W @ A * W).sum((-2, -1))
    if matrix.inputs == matrix.outputs:
        cosine = (W * A.mT).sum((-2, -1)) / (A.diagonal(dim1=-2, dim2=-1).sum(-1) * out).sqrt()
    else:
        _, S, V = svd(W)
        seen = ((A @ V) * V).sum(-2)
        cosine = (S * seen).sum(-1) / (seen.sum(-1) * out).sqrt()
    return float(cosine.nan_to_num(0.0).clamp(0, 1).mean())


def _kept_by_importance(
    config: "OSFTSettings", chosen: Sequence[Matrix], importance: Mapping[str, float]
) -> dict[str, float]:
    """Return ⌊r · all⌋ of each weight, r = least + I (most − least), with I of mean 1 over the weights."""
    mean = sum(importance.values()) / len(importance) or 1.0
    least, most = config.importance
    kept: dict[str, float] = {}
    for matrix in chosen:
        ratio = min(1.0, least + importance[matrix.weight] / mean * (most - least))
        kept[matrix.weight] = floor(ratio, directions(config, matrix))
    return kept
