"""Forms `one_sided` and `core`: an adapter that lives in the free directions, beside a weight that stays as it is.

    ΔW = c · B_out Z B_inᵀ        Z trains, from zero; c: see protection.scale

Each end is a basis B of the free directions, or, where it has none that is smaller, the operator P applied to Z in
the forward. one_sided has one basis, on the end where the free directions are few and all of them are in it; core has
both, which for a weight that is not square leaves out what lies free on the longer end alone.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treering.core import module_forward as forwards
from treering.core.full_precision import exactly
from treering.technique import Adapter, Applied, Derived, LazyTensor, Part, Site, TrainedMatrix
from treering.techniques.osft import coverage, protection
from treering.techniques.osft.operator import Operator
from treering.techniques.osft.protection import End, Side
from treering.techniques.osft.targets import Target, oriented

if TYPE_CHECKING:
    from treering.techniques.osft.settings import OSFTSettings


class Addend(nn.Module):
    """c · B_out Z B_inᵀ x. What decides which directions are open is computed in float32 or wider, the rest as x is."""

    def __init__(self, target: Target, ends: Mapping[End, Side], dtype: torch.dtype):
        super().__init__()
        self.ends = dict(ends)
        sizes = {"out": target.outputs, "in": target.inputs}
        for end, side in ends.items():
            self._frozen(f"B_{end}" if side.thin else f"Q_{end}", (side.size, side.columns), dtype)
            self._frozen(f"values_{end}", (side.columns,), dtype)
            if side.thin:
                sizes[end] = side.columns
            else:
                self._frozen(f"rest_{end}", (1,), dtype)
        self.Z = nn.Parameter(torch.empty(sizes["out"], sizes["in"], dtype=dtype, device="meta"))

    def _frozen(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        tensors = dict(self.named_parameters())
        with exactly():
            Z = held(self.ends, tensors)
            if "in" in self.ends and self.ends["in"].thin:
                # Inputs are large where they are held: rounded before the basis is applied, they would leak into it.
                x_low = x.to(Z.dtype) @ tensors["B_in"]
            else:
                x_low = x
        y = F.linear(x_low.to(x.dtype), Z.to(x.dtype))
        return F.linear(y, tensors["B_out"].to(y.dtype)) if "out" in self.ends and self.ends["out"].thin else y

    def matrix(self, own: str, linear: str) -> TrainedMatrix:
        """Return where the inputs and output gradients of Z, whose live name is `own`, are seen."""
        ends = {end: partial(self._seen, end) if end in self.ends else None for end in ("in", "out")}
        return TrainedMatrix(name=own, module=linear, inputs=ends["in"], outputs=ends["out"])

    def _seen(self, end: End, rows: Tensor) -> Tensor:
        """Return inputs or output gradients, a token a row, as Z sees them at one end."""
        tensors = dict(self.named_parameters())
        values, rows = tensors[f"values_{end}"], rows.to(self.Z.dtype)
        with exactly():
            if self.ends[end].thin:
                return rows @ tensors[f"B_{end}"] * values
            return Operator(tensors[f"Q_{end}"], values, tensors[f"rest_{end}"]).right(rows)


def held(ends: Mapping[End, Side], tensors: Mapping[str, Tensor]) -> Tensor:
    """Z as it acts between the bases: operators applied, values multiplied in."""
    Z = tensors["Z"]
    for end, side in ends.items():
        values = tensors[f"values_{end}"]
        if side.thin:
            Z = Z * values if end == "in" else values[:, None] * Z
        else:
            operator = Operator(tensors[f"Q_{end}"], values, tensors[f"rest_{end}"])
            Z = operator.right(Z) if end == "in" else operator.left(Z)
    return Z


def change(ends: Mapping[End, Side], tensors: Mapping[str, Tensor]) -> Tensor:
    """ΔW, outputs × inputs."""
    with exactly():
        D = held(ends, tensors)
        if "in" in ends and ends["in"].thin:
            D = D @ tensors["B_in"].mT
        return tensors["B_out"] @ D if "out" in ends and ends["out"].thin else D


def attach(model: nn.Module, config: "OSFTSettings", site: Site, chosen: Sequence[Target]) -> Applied:
    parts, names, undone, maps = {}, [], [], {}
    added: list[forwards.AddedForward] = []
    for target in chosen:
        module = model.get_submodule(target.module)
        weight = getattr(module, "weight", None)
        dtype = torch.promote_types(torch.float32 if weight is None else weight.dtype, torch.float32)
        addend = Addend(target, protection.addend_sides(config, target), dtype)
        module.add_module("osft", addend)
        added.append(forwards.AddedForward(module, addend))
        undone.append(forwards.install(added[-1]))
        own = f"{target.module}.osft"
        names.append(f"{own}.Z")
        maps[target.weight] = (addend.matrix(f"{own}.Z", target.module),)
        parts[target.weight] = _part(target, config, own, addend, dtype)

    return Applied(
        trainable=tuple(names),
        parts=parts,
        adapter=describe(chosen, model),
        undo=forwards.undo_all(undone),
        maps=maps,
        without=partial(forwards.switched_off, added),
        notes=(f"{len(names)} adapters in the free directions",),
    )


def _part(target: Target, config: "OSFTSettings", own: str, addend: Addend, dtype: torch.dtype) -> Part:
    shape = tuple(addend.Z.shape)  # of the whole: sharding will replace the parameter

    def split(
        weight: LazyTensor, below: Callable[[], Tensor], statistics: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        ends = tuple(addend.ends.values())
        made = protection.operators(ends, target, config.damping, weight.read, statistics)
        tensors = {f"{own}.Z": torch.zeros(shape, dtype=dtype)}
        c = protection.scale(ends, made, target, coverage.frozen(config, statistics))
        for side in ends:
            Q, values = made[side.end]
            tensors |= {f"{own}.{'B' if side.thin else 'Q'}_{side.end}": Q, f"{own}.values_{side.end}": c * values}
            if not side.thin:
                tensors[f"{own}.rest_{side.end}"] = c
            c = torch.ones_like(c)  # once is enough
        return tensors

    def join(tensors: Mapping[str, Tensor], below: Tensor) -> Tensor:
        mine = {name.rpartition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{own}.")}
        return below + oriented(change(addend.ends, mine), target).to(below.device)

    return Part(
        names=tuple(f"{own}.{name}" for name, _ in addend.named_parameters()),
        split=split,
        join=join,
        compute_dtype=dtype,
        tolerance=0.0,
        cost=protection.cost(tuple(addend.ends.values()), target),
        identity=protection.identity(config, tuple(addend.ends.values())),
        measured=config.protect != "weights",
    )


PREFIX = "base_model.model."  # peft's wrapper classes show in its keys


def describe(chosen: Sequence[Target], model: nn.Module) -> Adapter:
    derived: dict[str, Derived] = {}
    ranks: dict[str, int] = {}
    for target in chosen:
        addend: Addend = model.get_submodule(f"{target.module}.osft")  # type: ignore[assignment]
        own = tuple(f"{target.module}.osft.{name}" for name, _ in addend.named_parameters())
        rank = min(addend.Z.shape)
        ranks[target.module] = rank
        for half, shape in (("A", (rank, target.inputs)), ("B", (target.outputs, rank))):
            derived[f"{PREFIX}{target.module}.lora_{half}.weight"] = Derived(
                names=own,
                shape=shape,
                make=lambda tensors, half=half, addend=addend: _half(half, addend, tensors),  # type: ignore[misc]
            )
    first = next(iter(ranks.values()))
    body: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": first,
        "lora_alpha": first,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != first},
        "alpha_pattern": {name: rank for name, rank in ranks.items() if rank != first},
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(target.transposed for target in chosen),
        "target_modules": list(ranks),
        "inference_mode": True,
        "init_lora_weights": True,
    }
    return Adapter(name="osft", keys={}, derived=derived, config=body)


def _half(half: str, addend: Addend, tensors: Mapping[str, Tensor]) -> Tensor:
    mine = {name.rpartition(".")[2]: value for name, value in tensors.items()}
    Z = held(addend.ends, mine)
    out, into = mine.get("B_out"), mine.get("B_in")
    if Z.shape[0] <= Z.shape[1]:  # few rows: A is Z seen through the basis of inputs, B the basis of outputs
        if half == "A":
            return Z if into is None else Z @ into.mT
        return _identity(Z.shape[0], Z) if out is None else out
    if half == "B":
        return Z if out is None else out @ Z
    return _identity(Z.shape[1], Z) if into is None else into.mT


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
