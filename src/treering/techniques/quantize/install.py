"""Puts packed weights in the place of plain ones."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treering.core.errors import PlanError
from treering.core.module_forward import Switchable, install, switched_off, undo_all
from treering.experts.grouped_forward import grouped, release
from treering.formats import NVFP4, Format
from treering.formats.search import best_clip
from treering.technique import Applied, LazyTensor, Packing, Part, Site, StoredTensor
from treering.techniques.quantize.fake import FakeExperts, FakeForward, FakeQuantizer
from treering.techniques.quantize.packed import PackedExperts, PackedForward, PackedWeight

if TYPE_CHECKING:
    from treering.anatomy.matrices import Matrix
    from treering.techniques.quantize.settings import QuantizeSettings


def install_packed(model: nn.Module, config: "QuantizeSettings", site: Site) -> Applied:
    """Replace plain weights by ones that are encoded when they are loaded."""
    parts: dict[str, Part] = {}
    bits = elements = 0.0
    for matrix in config.matrices(site.anatomy):
        dtype = model.get_parameter(matrix.weight).dtype
        form = config.form(matrix, str(dtype).removeprefix("torch."))
        packed, own = _replace(model, matrix, form, dtype)
        parts[matrix.weight] = _part(config, matrix, packed, own, dtype)
        bits += form.bits(matrix.outputs, matrix.inputs) * matrix.numel
        elements += matrix.numel
    note = f"{len(parts)} weights in {config.format}, {bits / elements:.2f} bits an element, scales included"
    return Applied(parts=parts, notes=(note,))


def install_fake(model: nn.Module, config: "QuantizeSettings", site: Site) -> Applied:
    """Quantize plain weights where they multiply. They keep their names, values and dtype."""
    parts: dict[str, Part] = {}
    quantizers: list[Switchable] = []
    undo: list[Callable[[], None]] = []
    for matrix in config.matrices(site.anatomy):
        module = model.get_submodule(matrix.module)
        stored = model.get_parameter(matrix.weight).dtype
        cast = None if config.cast == "stored" else getattr(torch, config.cast)
        form = config.form(matrix, str(cast or stored).removeprefix("torch."))
        quantizer = FakeQuantizer(form, matrix, stored, cast, config.clip == "mse")
        if matrix.experts is None:
            undo.append(install(FakeForward(module, quantizer)))
        else:
            forward = grouped(module, matrix.module)
            plain = forward.sources[matrix.leaf]
            forward.sources[matrix.leaf] = FakeExperts(module, quantizer, plain)
            undo += [release(forward), partial(forward.sources.__setitem__, matrix.leaf, plain)]
        parts[matrix.weight] = _fake_part(matrix, quantizer)
        quantizers.append(quantizer)
    note = f"{len(parts)} weights multiply as {config.format} would hold them, and stay {_dtypes(model, parts)}"
    return Applied(parts=parts, undo=undo_all(undo), without=partial(switched_off, quantizers), notes=(note,))


def _dtypes(model: nn.Module, parts: Mapping[str, Part]) -> str:
    return " and ".join(sorted({str(model.get_parameter(name).dtype).removeprefix("torch.") for name in parts}))


def install_stored(model: nn.Module, matrices: "tuple[Matrix, ...]", weights: Mapping[str, StoredTensor]) -> Applied:
    """Replace plain weights by ones whose codes and scales are those of the folder, `weights` by plain name."""
    parts: dict[str, Part] = {}
    bits = elements = 0.0
    kinds: Counter[str] = Counter()
    for matrix in matrices:
        dtype, stored = model.get_parameter(matrix.weight).dtype, weights[matrix.weight]
        packed, own = _replace(model, matrix, stored.form, dtype, stored.rounding)
        parts[matrix.weight] = _stored_part(matrix, packed, own, dtype)
        bits += stored.form.bits(matrix.outputs, matrix.inputs) * matrix.numel
        elements += matrix.numel
        kinds[stored.form.label] += 1
    named = ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
    notes = [f"{len(parts)} weights as the folder stores them: {named}; {bits / max(elements, 1):.2f} bits an element"]
    if others := sorted(weights.keys() - parts.keys() & set(dict(model.named_parameters()))):
        notes.append(f"{len(others)} others are no linear layers or experts, and are decoded, such as {others[0]}")
    return Applied(parts=parts, notes=tuple(notes))


def _replace(
    model: nn.Module, matrix: "Matrix", form: Format, dtype: torch.dtype, rounding: torch.dtype | None = None
) -> tuple[PackedWeight, str]:
    """Put a packed weight in the place of a plain one. Return it and its live name."""
    module = model.get_submodule(matrix.module)
    shape = (*matrix.lead, matrix.outputs, matrix.inputs)
    packed = PackedWeight(form, shape, torch.device("meta"), dtype, rounding)
    child = "packed" if matrix.experts is None else f"packed_{matrix.leaf}"
    delattr(module, matrix.leaf)
    module.add_module(child, packed)
    if matrix.experts is None:
        install(PackedForward(module, packed))
    else:
        grouped(module, matrix.module).sources[matrix.leaf] = PackedExperts(packed)
    return packed, f"{matrix.module}.{child}"


def _part(config: "QuantizeSettings", matrix: "Matrix", packed: PackedWeight, own: str, dtype: torch.dtype) -> Part:
    form = packed.form
    largest: float | None = getattr(config, "largest", {}).get(matrix.weight)

    def split(
        weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        W = matrix.oriented(weight.read()).to(dtype)
        if not bool(torch.isfinite(W).all()):
            raise PlanError(f"quantize: {matrix.weight} has values that are not finite, which no number format holds")
        clip: Tensor | float = 1.0
        if config.clip == "mse":
            clip = best_clip(form, W)
        return {f"{own}.{key}": t for key, t in encoded(form, W, clip, largest).items()}

    return Part(
        names=tuple(f"{own}.{key}" for key in packed.keys),
        split=split,
        join=_decoded(matrix, packed, own, dtype),
        keeps_base=False,
        saved=False,
        independent_rows=_independent(matrix, form),
        tolerance=None,  # rounding is what it is for; how much is reported
        cost=float(matrix.numel) * (9 if config.clip == "mse" else 1),
        identity=f"quantize {form.settings()} {config.clip}" + (f" {largest!r}" if largest is not None else ""),
        measured=False,
        packing=_packing(matrix, packed, own),
    )


def encoded(form: Format, W: Tensor, clip: Tensor | float, largest: float | None) -> dict[str, Tensor]:
    """Return the tensors of W; `largest` is that of all matrices that share nvfp4's global scale with it."""
    if largest is None or not isinstance(form, NVFP4):
        return form.encode(W, clip=clip)
    return form.encode(W, clip=clip, amax=torch.full(W.shape[:-2], largest, dtype=torch.float32, device=W.device))


def _stored_part(matrix: "Matrix", packed: PackedWeight, own: str, dtype: torch.dtype) -> Part:
    def split(
        weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        assert weight.stored is not None, f"{matrix.weight} is not stored quantized"
        return {f"{own}.{key}": weight.stored.tensors[key].read() for key in packed.keys}

    return Part(
        names=tuple(f"{own}.{key}" for key in packed.keys),
        split=split,
        join=_decoded(matrix, packed, own, dtype),
        reads_weight=False,
        keeps_base=False,
        independent_rows=_independent(matrix, packed.form),
        tolerance=None,
        identity="stored",
        measured=False,
        copies={f"{own}.{key}": key for key in packed.keys},
        packing=_packing(matrix, packed, own),
    )


def _fake_part(matrix: "Matrix", quantizer: FakeQuantizer) -> Part:
    def join(tensors: Mapping[str, Tensor], below: Tensor) -> Tensor:
        return matrix.oriented(quantizer(matrix.oriented(below).to(quantizer.stored), below.dtype))

    def tensors(live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return quantizer.encode(matrix.oriented(live[matrix.weight]))

    form = quantizer.form
    return Part(
        names=(),
        split=lambda weight, below, statistics: {},
        join=join,
        independent_rows=_independent(matrix, form),
        tolerance=None,
        cost=float(matrix.numel),
        identity=f"fake {form.settings()} {quantizer.cast} {quantizer.search}",
        measured=False,
        packing=Packing(form=form, names=(matrix.weight,), tensors=tensors, transposed=matrix.transposed),
    )


def _packing(matrix: "Matrix", packed: PackedWeight, own: str) -> Packing:
    """Return how a packed weight is published: its tensors as they are."""
    names = {f"{own}.{key}": key for key in packed.keys}

    def tensors(live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: live[name] for name, key in names.items()}

    return Packing(form=packed.form, names=tuple(names), tensors=tensors, transposed=matrix.transposed)


def _decoded(matrix: "Matrix", packed: PackedWeight, own: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return the `join` of a packed weight."""

    def join(tensors: Mapping[str, Tensor], below: Tensor) -> Tensor:
        stored = {key: tensors[f"{own}.{key}"] for key in packed.keys}
        W = packed.decode(stored, torch.promote_types(dtype, torch.float32))
        return below + matrix.oriented(W).to(below.device)

    return join


def _independent(matrix: "Matrix", form: Format) -> bool:
    """Return whether rows of the plain weight can be encoded, or kept, without the others."""
    by_rows = all(piece.by_rows for piece in form.pieces(matrix.outputs, matrix.inputs).values())
    return bool(matrix.lead) or (by_rows and not matrix.transposed)
