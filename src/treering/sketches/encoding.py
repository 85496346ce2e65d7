"""From numbers of rows to what an index stores of them, and back."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from treering.core.errors import DataError
from treering.sketches import codes, topk
from treering.sketches.recipe import IndexModule, IndexRecipe
from treering.sketches.shards import EncodedRows


def encode(recipe: IndexRecipe, rows: Mapping[str, Tensor], ids: Sequence[str]) -> EncodedRows:
    """Return the stored tensors, on the CPU, of documents whose numbers [n, numbers] are given by module.

    Raises DataError, with the id of the document, where a number is not finite.
    """
    encoded = {}
    for module in recipe.modules:
        x = rows.get(module.name)
        if x is None or tuple(x.shape) != (len(ids), module.numbers):
            found = "no rows" if x is None else f"rows of {tuple(x.shape)}"
            raise DataError(f"{module.name} came with {found}; {(len(ids), module.numbers)} are wanted")
        encoded[module.name] = encode_rows(recipe, module, x, ids)
    return encoded


def encode_rows(recipe: IndexRecipe, module: IndexModule, x: Tensor, ids: Sequence[str]) -> dict[str, Tensor]:
    """Return the stored tensors, on the CPU, of one module for the rows [n, numbers] of documents `ids`."""
    _refuse_not_finite(x, module.name, ids)
    return {name: tensor.cpu() for name, tensor in encode_module(recipe, module, x).items()}


def encode_module(recipe: IndexRecipe, module: IndexModule, x: Tensor) -> dict[str, Tensor]:
    """Return the stored tensors of one module for finite rows [n, numbers]."""
    if recipe.settings.kind == "eigen-topk":
        entries = min(recipe.settings.entries, module.numbers)
        gaps, values, scales = topk.encode(x, entries, recipe.settings.restore_norm)
        return {"gaps": gaps, "values": values, "scales": scales}
    encoded, scales = codes.encode(x, recipe.settings.storage)
    return {"codes": encoded, "scales": scales}


def decode_module(recipe: IndexRecipe, module: IndexModule, stored: Mapping[str, Tensor]) -> Tensor:
    """Return rows [n, numbers], float32, of the stored tensors of one module."""
    if recipe.settings.kind == "eigen-topk":
        return topk.decode(stored["gaps"], stored["values"], stored["scales"], module.numbers)
    return codes.decode(stored["codes"], stored["scales"], module.numbers, recipe.settings.storage)


def _refuse_not_finite(x: Tensor, module: str, ids: Sequence[str]) -> None:
    # Not isfinite of every number: where one is not finite, a sum is not, and nearly always only there.
    finite = torch.isfinite(x.sum(1))
    if bool(finite.all()):
        return
    suspects = (~finite).nonzero()[:, 0].tolist()
    bad = [row for row in suspects if not bool(torch.isfinite(x[row]).all())]
    if bad:
        name = ids[bad[0]]
        raise DataError(
            f"the gradient of {name} is not finite in {module}; look at the document, compute in a wider dtype, or "
            "leave it out of the data"
        )
