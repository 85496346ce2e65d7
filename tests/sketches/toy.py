"""Small modules with curvature, and documents of tokens, for the tests of sketches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from treering.core.seeds import generator
from treering.sketches.maps import ModuleMap, SideBasis, module_map
from treering.sketches.rows import RowSums, TokenSpans
from treering.sketches.settings import SketchSettings

SHAPES = {"model.layers.0.up.weight": (24, 12), "model.layers.0.down.weight": (12, 20), "model.layers.0.A": (3, 12)}


@dataclass(frozen=True, kw_only=True)
class ToyModule:
    """Pairs of tokens, and what was measured on them."""

    name: str
    a: Tensor
    g: Tensor
    corrected: Tensor

    @property
    def A(self) -> Tensor:
        return self.a.double().T @ self.a.double() / len(self.a)

    @property
    def S(self) -> Tensor:
        return self.g.double().T @ self.g.double() / len(self.g)

    @property
    def shape(self) -> tuple[int, int]:
        return self.g.shape[1], self.a.shape[1]

    def map(self, settings: SketchSettings) -> ModuleMap:
        return module_map(
            settings,
            self.name,
            *self.shape,
            input_basis=basis(self.A),
            gradient_basis=basis(self.S),
            corrected=self.corrected,
        )


def basis(moment: Tensor) -> SideBasis:
    values, vectors = torch.linalg.eigh(moment)
    return SideBasis(values=values, vectors=vectors)


def normal(*shape: int, name: str = "") -> Tensor:
    return torch.randn(*shape, generator=generator(0, "toy", name, *shape))


def modules(tokens: int = 90, shapes: dict[str, tuple[int, int]] = SHAPES, seed: int = 0) -> dict[str, ToyModule]:
    """Modules whose directions differ in size, as those of a model do."""
    made = {}
    for name, (N, M) in shapes.items():
        a = normal(tokens, M, name=f"{name} a {seed}") * torch.logspace(0, -1.5, M)
        g = normal(tokens, N, name=f"{name} g {seed}") * torch.logspace(0, -1.5, N)
        made[name] = ToyModule(name=name, a=a, g=g, corrected=torch.rand(N, M, generator=generator(1, name)) + 0.05)
    return made


def sums(of: dict[str, ToyModule], settings: SketchSettings, spans: TokenSpans, documents: int) -> RowSums:
    group = RowSums({name: module.map(settings) for name, module in of.items()}, documents)
    for name, module in of.items():
        group.add(name, module.a, module.g, spans)
    return group
