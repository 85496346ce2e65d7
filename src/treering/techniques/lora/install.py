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
from treering.experts.grouped_forward import Addition, grouped, release, unsupported
from treering.store.model_folder import fingerprint
from treering.technique import Applied, LazyTensor, Part, Site
from treering.techniques.lora.addend import Addend, ExpertAddend
from treering.techniques.lora.peft_format import describe
from treering.techniques.lora.starts import splitter

if TYPE_CHECKING:
    from treering.anatomy.matrices import Matrix
    from treering.techniques.lora.settings import LoRASettings

RESIDUAL = ("residual", "activation")


def install(model: nn.Module, config: "LoRASettings", site: Site) -> Applied:
    """Put an adapter next to each matrix that the settings name."""
    parts, names, undo, maps, warnings = {}, [], [], {}, []
    added: list[module_forward.Switchable] = []
    matrices = config.matrices(site.anatomy)
    _check(model, config, matrices)
    if config.init in RESIDUAL:
        warnings = _residual_warnings(config, matrices, site)
    originals = _originals(config, matrices, site)
    for matrix in matrices:
        module = model.get_submodule(matrix.module)
        stored = _stored_dtype(module, matrix)
        dtype = stored if config.dtype == "base" else getattr(torch, config.dtype)
        addend = (ExpertAddend if matrix.lead else Addend)(matrix, config.rank, config.scale, dtype)
        child = config.child(matrix)
        module.add_module(child, addend)
        if matrix.lead:
            forward, addition = grouped(module, matrix.module), Addition(addend)
            forward.addends[matrix.leaf].append(addition)
            undo.append(release(forward, addition))
            added.append(addition)
        else:
            added_forward = module_forward.AddedForward(module, addend)
            undo.append(module_forward.install(added_forward))
            added.append(added_forward)
        prefix = f"{matrix.module}.{child}"
        maps[matrix.weight] = addend.trained(prefix, matrix)
        names += [f"{prefix}.A", f"{prefix}.B"]
        quantized = _quantized(matrix, site)
        started = config if quantized or config.init not in RESIDUAL else replace(config, init="kaiming_zeros")
        parts[matrix.weight] = _part(matrix, started, prefix, dtype, stored, site.seed, originals.get(matrix.weight))

    return Applied(
        trainable=tuple(names),
        parts=parts,
        adapter=describe(config, matrices),
        undo=module_forward.undo_all(undo),
        maps=maps,
        # PiSSA moved part of the base into A and B: without them, the model is not the base model.
        without=None if config.init == "pissa" else partial(module_forward.switched_off, added),
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


def _identity(config: "LoRASettings") -> str:
    """Return what identifies the unquantized weights that a start depends on."""
    if config.original is None or not Path(config.original).is_dir():
        return "" if config.original is None else f" {config.original}"
    return f" {fingerprint(Path(config.original))}"


def _quantized(matrix: "Matrix", site: Site) -> bool:
    return any(not part.keeps_base or part.packing is not None for part in site.parts.get(matrix.weight, ()))


def _residual_warnings(config: "LoRASettings", matrices: "Sequence[Matrix]", site: Site) -> list[str]:
    """Return what a user who asked for a start from the residual has to know."""
    plain = [matrix.weight for matrix in matrices if not _quantized(matrix, site)]
    warnings = []
    if plain:
        warnings.append(
            f"lora: init {config.init} starts from what quantizing leaves out, and {len(plain)} of {len(matrices)} "
            f"weights are not quantized ({plain[0]}): their adapters start at kaiming_zeros"
        )
    if config.init == "activation" and site.statistics is not None:
        from treering.curvature.counts import counted

        for weight, tokens in counted(matrices, site.statistics).items():
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
    return f"{' and '.join(kinds)} of rank {config.rank}, scale {config.scale:g}, start {config.init}"


def _part(
    matrix: "Matrix",
    config: "LoRASettings",
    prefix: str,
    dtype: torch.dtype,
    stored: torch.dtype,
    seed: int,
    original: LazyTensor | None,
) -> Part:
    def join(tensors: Mapping[str, Tensor], below: Tensor) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        BA = (tensors[f"{prefix}.B"].to(wide) @ tensors[f"{prefix}.A"].to(wide)).mul_(config.scale)
        return below + matrix.oriented(BA).to(below.device)

    pissa, residual = config.init == "pissa", config.init in RESIDUAL
    return Part(
        names=(f"{prefix}.A", f"{prefix}.B"),
        split=splitter(matrix, config, prefix, seed, original),
        join=join,
        reads_weight=pissa or residual,
        moves_base=pissa,
        compute_dtype=None if config.dtype == "base" else dtype,
        independent_rows=bool(matrix.lead),
        tolerance=_tolerance(config, dtype, stored),
        cost=float(matrix.rank * matrix.numel) if pissa or residual else 0.0,
        identity=f"lora {config.init} {config.rank} {config.scale}{_identity(config)}" if residual else "",
        measured=config.init == "activation",
    )


def _tolerance(config: "LoRASettings", dtype: torch.dtype, stored: torch.dtype) -> float | None:
    if config.init == "file" or config.init in RESIDUAL:
        return None  # an imported adapter changes the weight; a residual start brings back a part of it
    if config.init == "kaiming_zeros":
        return 0.0
    # The moved base is rounded to the dtype it is stored in, and A and B to theirs.
    return 4 * max(torch.finfo(stored).eps, torch.finfo(dtype).eps)
