"""Puts adapters next to linear layers and stacks of experts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treering.core import module_forward
from treering.core.errors import PlanError
from treering.experts.grouped_forward import add_to, unsupported
from treering.store.model_folder import fingerprint
from treering.technique import Applied, LazyTensor, Part, Site
from treering.techniques.lora.addend import Addend, ExpertAddend
from treering.techniques.lora.peft_experts import of_each_expert
from treering.techniques.lora.peft_format import describe
from treering.techniques.lora.settings import RESIDUAL
from treering.techniques.lora.starts import Split, splitter
from treering.weights.expert_names import published_matrices

if TYPE_CHECKING:
    from treering.anatomy.matrices import Matrix
    from treering.techniques.lora.settings import AdapterSettings, LoRASettings


def install(model: nn.Module, config: "LoRASettings", site: Site) -> Applied:
    """Put an adapter next to each matrix that the settings name."""
    parts, names, undo, maps, warnings = {}, [], [], {}, []
    added: list[module_forward.Switchable] = []
    matrices = config.matrices(site.anatomy)
    _check(model, config, matrices)
    warnings = _residual_warnings(config, matrices, site)
    each = config.file is not None and of_each_expert(Path(config.file))
    originals = _originals(config, matrices, site)
    for matrix in matrices:
        chosen = config.of(matrix)
        module = model.get_submodule(matrix.module)
        stored = _stored_dtype(module, matrix)
        dtype = stored if chosen.dtype == "base" else getattr(torch, chosen.dtype)
        addend = (ExpertAddend if matrix.lead else Addend)(matrix, chosen.rank, chosen.scale, dtype)
        child = config.child(matrix)
        module.add_module(child, addend)
        switch, remove = add_to(module, matrix, addend)
        added.append(switch)
        undo.append(remove)
        prefix = f"{matrix.module}.{child}"
        maps[matrix.weight] = addend.trained(prefix, matrix)
        names += [f"{prefix}.A", f"{prefix}.B"]
        if chosen.init in RESIDUAL and not _quantized(matrix, site):
            chosen = replace(chosen, init="kaiming_zeros")
        split = splitter(
            matrix,
            chosen,
            prefix,
            site.seed,
            published=published_matrices(model, matrix) if each and matrix.lead else (),
            original=originals.get(matrix.weight),
        )
        parts[matrix.weight] = _part(matrix, chosen, prefix, dtype, stored, split)

    return Applied(
        trainable=tuple(names),
        parts=parts,
        adapter=describe(config, matrices),
        undo=module_forward.undo_all(undo),
        maps=maps,
        # PiSSA moved part of the base into A and B: without them, the model is not the base model.
        without=None
        if any(config.of(m).init == "pissa" for m in matrices)
        else partial(module_forward.switched_off, added),
        notes=(_note(config, matrices),),
        warnings=tuple(warnings),
    )


def _originals(config: "LoRASettings", matrices: "Sequence[Matrix]", site: Site) -> Mapping[str, LazyTensor]:
    """Return the unquantized weights by plain name, whose shapes are checked; none where none are named."""
    if config.original is None:
        return {}
    copied = {name for name, parts in site.parts.items() if any(part.copies for part in parts)}
    wanted = [matrix for matrix in matrices if matrix.weight in copied]
    if not wanted or site.open_folder is None:
        raise PlanError(
            "lora: original names the unquantized weights of a folder that stores them quantized, and none of the "
            "targets is stored quantized here; leave it out: the residual of what is quantized here is known",
            settings=("lora.original",),
        )
    tensors = site.open_folder(config.original)
    for matrix in wanted:
        found = tensors.get(matrix.weight)
        if found is None or tuple(found.shape) != matrix.shape or found.stored is not None:
            has = "none" if found is None else f"{list(found.shape)}"
            raise PlanError(
                f"lora: {config.original} has {has} for {matrix.weight}, which is {list(matrix.shape)} here; name the "
                "unquantized folder of this model as lora.original",
                settings=("lora.original",),
            )
    return {matrix.weight: tensors[matrix.weight] for matrix in wanted}


def _quantized(matrix: "Matrix", site: Site) -> bool:
    return any(not part.keeps_base or part.packing is not None for part in site.parts.get(matrix.weight, ()))


def _residual_warnings(config: "LoRASettings", matrices: "Sequence[Matrix]", site: Site) -> list[str]:
    """Return what a user who asked for a start from the residual has to know."""
    matrices = [matrix for matrix in matrices if config.of(matrix).init in RESIDUAL]
    plain = [matrix.weight for matrix in matrices if not _quantized(matrix, site)]
    warnings = []
    if plain:
        warnings.append(
            f"lora: init {config.of(matrices[0]).init} starts from what quantizing leaves out, and {len(plain)} of "
            f"{len(matrices)} weights are not quantized ({plain[0]}): their adapters start at kaiming_zeros"
        )
    measured = [matrix for matrix in matrices if config.of(matrix).init == "activation"]
    if measured and site.statistics is not None:
        from treering.curvature.counts import counted

        for weight, tokens in counted(measured, site.statistics).items():
            if empty := tokens.count(0):
                warnings.append(
                    f"lora: no measured token reached {empty} of the {len(tokens)} matrices of {weight}: they start "
                    "from the plain residual"
                )
    return warnings


def _check(model: nn.Module, config: "LoRASettings", matrices: "Sequence[Matrix]") -> None:
    """Raise PlanError before anything is changed."""
    for matrix in matrices:
        module = model.get_submodule(matrix.module)
        if hasattr(module, config.child(matrix)):
            raise PlanError(
                f"lora: {matrix.module} already has an adapter called {config.name!r}; give this one another name"
            )
        if matrix.lead and (reason := unsupported(module)):
            raise PlanError(
                f"lora: {matrix.weight}: {reason}, so its experts cannot have adapters. Leave them out: "
                "lora.targets: [q_proj, k_proj, v_proj, o_proj]",
                settings=("lora.targets",),
            )


def _stored_dtype(module: nn.Module, matrix: "Matrix") -> torch.dtype:
    """Return the dtype of the plain weight, or the one that it would have where codes or factors are stored."""
    weight = getattr(module, matrix.leaf, None)
    if isinstance(weight, Tensor):
        return weight.dtype
    children = [child for child in module.children() if isinstance(getattr(child, "plain_dtype", None), torch.dtype)]
    return children[0].plain_dtype if children else torch.float32  # type: ignore[return-value]


def _note(config: "LoRASettings", matrices: "Sequence[Matrix]") -> str:
    linears = sum(not matrix.lead for matrix in matrices)
    stacks = [matrix for matrix in matrices if matrix.lead]
    kinds = [f"{linears} adapters"] if linears else []
    kinds += [f"adapters for each expert of {len(stacks)} stacks"] if stacks else []
    every = [config.of(matrix) for matrix in matrices]
    ranks = [rank for one in every for rank in one.ranks]
    starts, scales = ({getattr(one, name): None for one in every} for name in ("init", "scale"))
    rank = f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    scale = f"scale {' or '.join(f'{scale:g}' for scale in sorted(scales))}"
    note = f"{' and '.join(kinds)} of {rank}, {scale}, start {' or '.join(starts)}"
    if config.allocate == "uniform":
        return note
    if not config.ranks:
        return f"{note}; ranks are chosen when weights are read, and until then they are equal"
    stored = sum(one.rank * len(one.ranks) * (m.outputs + m.inputs) for one, m in zip(every, matrices, strict=True))
    used = sum(sum(one.ranks) * (m.outputs + m.inputs) for one, m in zip(every, matrices, strict=True))
    return f"{note}; {used:,} trained numbers, stored as {stored:,}: the ranks of a stack are filled up with zeros"


def _part(
    matrix: "Matrix", config: "AdapterSettings", prefix: str, dtype: torch.dtype, stored: torch.dtype, split: Split
) -> Part:
    def join(tensors: Mapping[str, Tensor], below: Tensor) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        BA = (tensors[f"{prefix}.B"].to(wide) @ tensors[f"{prefix}.A"].to(wide)).mul_(config.scale)
        return below + matrix.oriented(BA).to(below.device)

    pissa, residual = config.init == "pissa", config.init in RESIDUAL
    return Part(
        names=(f"{prefix}.A", f"{prefix}.B"),
        split=split,
        join=join,
        reads_weight=pissa or residual,
        moves_base=pissa,
        compute_dtype=None if config.dtype == "base" else dtype,
        independent_rows=bool(matrix.lead),
        tolerance=_tolerance(config, dtype, stored),
        cost=float(matrix.rank * matrix.numel) if pissa or residual else 0.0,
        identity=_identity(config) if residual else "",
        measured=config.init == "activation",
    )


def _identity(config: "AdapterSettings") -> str:
    """Return what a start from the residual depends on, besides the weight and the statistics."""
    text = f"lora {config.init} {config.rank} {config.scale}"
    if len(set(config.ranks)) > 1:
        text += f" {config.ranks}"
    if config.original is not None:  # the unquantized weights
        folder = Path(config.original)
        text += f" {fingerprint(folder) if folder.is_dir() else config.original}"
    return text


def _tolerance(config: "AdapterSettings", dtype: torch.dtype, stored: torch.dtype) -> float | None:
    if config.init == "file" or config.init in RESIDUAL:
        return None  # an imported adapter changes the weight; a residual start brings back a part of it
    if config.init == "kaiming_zeros":
        return 0.0
    # The moved base is rounded to the dtype it is stored in, and A and B to theirs.
    return 4 * max(torch.finfo(stored).eps, torch.finfo(dtype).eps)
