"""Statistics for tests: second moments of random inputs with a spectrum that falls, of any model's targets."""

from collections.abc import Mapping

import torch
from torch import Tensor

import treering as tr
from treering.anatomy import examine
from treering.core.seeds import generator
from treering.techniques.osft.protection.targets import targets


def moments(model: torch.nn.Module, config: tr.OSFT, seed: int = 0) -> Mapping[str, Mapping[str, Tensor]]:
    found = {}
    for target in targets(config, examine(model)):
        lead = () if target.experts is None else (target.experts,)
        draw = generator(seed, "moments", target.weight)
        X = torch.randn(*lead, 4 * target.inputs, target.inputs, generator=draw, dtype=torch.float64)
        X = X * torch.logspace(0, -2, target.inputs, dtype=torch.float64)
        found[target.weight] = {"inputs": X.mT @ X / X.shape[-2], "tokens": torch.tensor(float(X.shape[-2]))}
    return found
