"""One way to compare: relative to the largest element of the reference, telling the worst element and where it is."""

import torch
from torch import Tensor


def assert_same(found: Tensor, wanted: Tensor, tolerance: float = 0.0, what: str = "tensor") -> None:
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, wanted {tuple(wanted.shape)}"
    if not found.numel():
        return
    difference = (found.detach().double() - wanted.detach().double()).abs()
    largest = wanted.detach().double().abs().max().clamp_min(1e-300)
    worst = int(difference.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), difference.shape)) if found.ndim else ()
    ratio = float(difference.flatten()[worst] / largest)
    assert ratio <= tolerance, (
        f"{what}: {ratio:.2e} > {tolerance:.0e} at {where}: "
        f"{float(found.detach().flatten()[worst]):.9g}, wanted {float(wanted.detach().flatten()[worst]):.9g}"
    )


def assert_all_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == wanted.keys(), f"names differ: {sorted(found.keys() ^ wanted.keys())[:4]}"
    for name, value in wanted.items():
        assert_same(found[name], value, tolerance, name)
