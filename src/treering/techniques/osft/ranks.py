"""How many directions of each weight are free: by one ratio, by the spectrum, or by how much a weight is used."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from treering.anatomy import Anatomy, matches
from treering.techniques.osft.decompose import svd
from treering.techniques.osft.moment import moment
from treering.techniques.osft.targets import Target, oriented, targets

if TYPE_CHECKING:
    from treering.techniques.osft.settings import OSFTSettings

OF_WEIGHTS, OF_INPUTS = 0.25, 0.5  # free where nothing is written

_Settings = TypeVar("_Settings", bound="OSFTSettings")


def free(config: "OSFTSettings", target: Target) -> int:
    """Free directions of `target`: floor(ratio · those there are), unless `resolve` counted them."""
    if target.weight in config.free:
        return config.free[target.weight]
    ratio = asked(config, target)
    if ratio is None:
        ratio = OF_WEIGHTS if config.protect == "weights" else OF_INPUTS
    return floor(ratio, choices(config, target))


def floor(ratio: float, number: int) -> int:
    return int(ratio * number + 1e-9)  # 0.1 · 30 is 3, whatever binary fractions make of it


def asked(config: "OSFTSettings", target: Target) -> float | None:
    """The ratio that the user wrote for `target`."""
    ratio = config.ratio
    for pattern, own in config.ratios.items():
        if matches(target.weight, pattern) or matches(target.module, pattern):
            ratio = own
    return ratio


def everywhere(config: "OSFTSettings", target: Target) -> bool:
    """Whether every direction is held by its own use, and none is simply free: soft protection without a number."""
    softly = config.strength == "soft" and config.protect != "weights" and config.form == "update"
    return softly and asked(config, target) is None and target.weight not in config.free


def choices(config: "OSFTSettings", target: Target) -> int:
    """Directions there are to choose among: singular ones, or those of the inputs."""
    return target.rank if config.protect == "weights" else target.inputs


def resolved(config: "_Settings", anatomy: Anatomy, source: Any, statistics: Any) -> "_Settings":
    """`config` with the numbers of free directions written into `free`. Shared out over ranks, the same on all."""
    chosen = targets(config, anatomy)
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    by_cost = sorted(chosen, key=lambda t: (-t.rank * t.inputs * t.outputs * (t.experts or 1), t.weight))
    measure = _kept_by_energy if config.rank == "energy" else _turning
    own = {t.weight: measure(config, t, source, (statistics or {}).get(t.weight)) for t in by_cost[rank::world]}
    found = _everyones(own, world)
    if config.rank == "importance":
        found = _kept_by_importance(config, chosen, found)
    return replace(config, free={t.weight: choices(config, t) - int(found[t.weight]) for t in chosen})


def _everyones(own: dict[str, float], world: int) -> dict[str, float]:
    if world == 1:
        return own
    parts: list[dict[str, float]] = [{}] * world
    dist.all_gather_object(parts, own)
    return {name: value for part in parts for name, value in part.items()}


def _kept_by_energy(
    config: "OSFTSettings", target: Target, source: Any, statistics: Mapping[str, Tensor] | None
) -> float:
    """The fewest directions that hold `energy` of the spectrum; of experts, as many as the one that needs most."""
    if config.protect == "weights":
        W = source.tensors[target.weight].read()
        energy = torch.linalg.svdvals(W.to(torch.promote_types(W.dtype, torch.float32))).double().square()
    else:
        energy = torch.linalg.eigvalsh(moment(target, statistics).double()).flip(-1).clamp_min(0)
    share = energy.cumsum(-1) / energy.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    # Rounding may leave the last share a hair under 1, which is all there is to keep.
    needed = (share < min(config.energy, 1 - 1e-12)).sum(-1) + 1
    needed = torch.where(
        energy.sum(-1) > 0, needed, torch.zeros_like(needed)
    )  # an expert that saw no token asks nothing
    return float(needed.clamp(max=choices(config, target)).max())


def _turning(config: "OSFTSettings", target: Target, source: Any, statistics: Mapping[str, Tensor] | None) -> float:
    """The paper's importance, mean cosine of x and W x, as a ratio of means over the measured inputs.

    Where inputs and outputs differ in number x cannot be compared with W x; T x can, with T = U Vᵀ the nearest
    isometry, and T is what W does besides stretching.
    """
    W = oriented(source.tensors[target.weight].read().double(), target)
    A = moment(target, statistics).double()
    out = (W @ A * W).sum((-2, -1))
    if target.inputs == target.outputs:
        cosine = (W * A.mT).sum((-2, -1)) / (A.diagonal(dim1=-2, dim2=-1).sum(-1) * out).sqrt()
    else:
        _, S, V = svd(W)
        seen = ((A @ V) * V).sum(-2)
        cosine = (S * seen).sum(-1) / (seen.sum(-1) * out).sqrt()
    return float(cosine.nan_to_num(0.0).clamp(0, 1).mean())


def _kept_by_importance(
    config: "OSFTSettings", chosen: Sequence[Target], found: Mapping[str, float]
) -> dict[str, float]:
    """floor(r · all), r = least + I (most − least), with I of mean 1 over the weights."""
    mean = sum(found.values()) / len(found) or 1.0
    least, most = config.importance
    kept: dict[str, float] = {}
    for target in chosen:
        ratio = min(1.0, least + found[target.weight] / mean * (most - least))
        kept[target.weight] = floor(ratio, choices(config, target))
    return kept
