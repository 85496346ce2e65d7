"""Puts packed weights in the place of plain ones."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treering.core.errors import PlanError
from treering.core.module_forward import install
from treering.experts.grouped_forward import grouped
from treering.formats.search import best_clip
from treering.technique import Applied, LazyTensor, Part, Site
from treering.techniques.quantize.packed import PackedExperts, PackedForward, PackedWeight

if TYPE_CHECKING:
    from treering.anatomy.matrices import Matrix
    from treering.techniques.quantize.settings import QuantizeSettings


def install_packed(model: nn.Module, config: "QuantizeSettings", site: Site) -> Applied:
    parts: dict[str, Part] = {}
    bits = elements = 0.0
    for matrix in config.matrices(site.anatomy):
        module = model.get_submodule(matrix.module)
        weight = model.get_parameter(matrix.weight)
        form = config.form(matrix, str(weight.dtype).removeprefix("torch."))
        packed = PackedWeight(form, (*matrix.lead, matrix.outputs, matrix.inputs), torch.device("meta"), weight.dtype)
        child = "packed" if matrix.experts is None else f"packed_{matrix.leaf}"
        delattr(module, matrix.leaf)
        module.add_module(child, packed)
        if matrix.experts is None:
            install(PackedForward(module, packed))
        else:
            grouped(module, matrix.module).sources[matrix.leaf] = PackedExperts(packed)
        parts[matrix.weight] = _part(config, matrix, packed, f"{matrix.module}.{child}", weight.dtype)
        bits += form.bits(matrix.outputs, matrix.inputs) * matrix.numel
        elements += matrix.numel
    note = f"{len(parts)} weights in {config.format}, {bits / elements:.2f} bits an element, scales included"
    return Applied(parts=parts, notes=(note,))


def _part(config: "QuantizeSettings", matrix: "Matrix", packed: PackedWeight, own: str, dtype: torch.dtype) -> Part:
    form = packed.form

    def split(
        weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        W = matrix.oriented(weight.read()).to(dtype)
        if not bool(torch.isfinite(W).all()):
            raise PlanError(f"quantize: {matrix.weight} has values that are not finite, which no number format holds")
        clip: Tensor | float = 1.0
        if config.clip == "mse":
            clip = best_clip(form, W)
        return {f"{own}.{key}": t for key, t in form.encode(W, clip=clip).items()}

    def join(tensors: Mapping[str, Tensor], below: Tensor) -> Tensor:
        stored = {key: tensors[f"{own}.{key}"] for key in packed.keys}
        W = form.decode(stored, matrix.inputs, torch.promote_types(dtype, torch.float32))
        return below + matrix.oriented(W).to(below.device)

    by_rows = all(piece.by_rows for piece in form.pieces(matrix.outputs, matrix.inputs).values())
    return Part(
        names=tuple(f"{own}.{key}" for key in packed.keys),
        split=split,
        join=join,
        keeps_base=False,
        saved=False,
        independent_rows=bool(matrix.lead) or (by_rows and not matrix.transposed),
        tolerance=None,  # rounding is what it is for; how much is reported
        cost=float(matrix.numel) * (9 if config.clip == "mse" else 1),
        identity=f"quantize {form.settings()} {config.clip}",
        measured=False,
    )
