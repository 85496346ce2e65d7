"""A folder's weights quantized and written without a model in memory: one matrix is read, encoded, measured at a time.

With the second moments C = E[x xᵀ] of a matrix's inputs, the relative error of its outputs is

    √( Σ diag(D C Dᵀ) / Σ diag(W C Wᵀ) )        D = Q(W) − W
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.plan.export import export
from treering.plan.packed_export import packing_of
from treering.plan.plan import Chain, Plan, Statistics, split
from treering.plan.splitting import InMemory
from treering.plan.values import Values
from treering.technique import LazyTensor, Packing

ERRORS = "quantization_errors.json"


@dataclass(frozen=True, kw_only=True)
class MatrixError:
    """What quantizing did to one matrix.

    Attributes:
        weight: the plain name.
        expert: which of a stack; None: the weight is one matrix.
        outputs, inputs: its shape.
        bits: stored for an element, scales included.
        weight_error: ‖Q(W) − W‖ / ‖W‖.
        output_error: the same of W x over the measured inputs; None: there are none.
        tokens: how many were measured.
    """

    weight: str
    expert: int | None
    outputs: int
    inputs: int
    bits: float
    weight_error: float
    output_error: float | None = None
    tokens: int | None = None


def write_quantized(
    plan: Plan,
    folder: Path,
    *,
    statistics: Statistics | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda weight: None,
) -> list[MatrixError]:
    """Write the weights of a drafted plan as a quantized folder, with the error of each matrix in a JSON file.

    Args:
        plan: whose techniques quantize, and do nothing else.
        folder: to write.
        statistics: of the inputs of its matrices, by plain name.
        about: more facts for the JSON file.
        progress: called with the name of each weight that is read.
    """
    errors: list[MatrixError] = []
    splitting = _Splitting(plan, statistics, errors.append, progress)
    values = Values(names=frozenset(plan.live()), read=splitting.read)

    def describe(temporary: Path) -> None:
        description = {**(about or {}), "matrices": [asdict(one) for one in errors]}
        (temporary / ERRORS).write_text(json.dumps(description, indent=1), encoding="utf-8")

    export(plan, folder, None, packed=True, values=values, extra=describe)
    return errors


class _Splitting:
    """First values of the live tensors, computed when they are read; those of the last weight are kept."""

    def __init__(
        self,
        plan: Plan,
        statistics: Statistics | None,
        report: Callable[[MatrixError], None],
        progress: Callable[[str], None],
    ):
        assert plan.source is not None, "this plan was drafted without weights"
        self.source, self.live = plan.source.tensors, plan.live()
        self.statistics, self.report, self.progress = statistics, report, progress
        self.chains = {name: chain for chain in plan.chains.values() for name in chain.names}
        self.last: tuple[str, dict[str, Tensor]] = ("", {})

    def read(self, name: str) -> Tensor:
        chain = self.chains.get(name)
        if chain is None:
            return self.source[name].read().to(self.live[name].dtype)
        if self.last[0] != chain.name:
            self.last = "", {}
            self.last = chain.name, self._split(chain)
        return self.last[1][name]

    def _split(self, chain: Chain) -> dict[str, Tensor]:
        self.progress(chain.name)
        packing = packing_of(chain)
        assert packing is not None, f"{chain.name} is not quantized"
        parts = []
        for piece in _pieces(chain, self.source[chain.name]):
            tensors = split(chain, piece, self.live, None)
            self._measure(chain, packing, piece, tensors)
            parts.append(tensors)
        return {name: torch.cat([t[name] for t in parts]) if len(parts) > 1 else parts[0][name] for name in parts[0]}

    def _measure(self, chain: Chain, packing: Packing, piece: InMemory, tensors: Mapping[str, Tensor]) -> None:
        W = piece.read().float()
        W = W.mT if packing.transposed else W
        Q = packing.form.decode(packing.tensors(tensors), W.shape[-1], torch.float32)
        measured = (self.statistics or {}).get(chain.name)
        for i in range(len(W)) if W.ndim > 2 else (None,):
            expert = None if i is None else piece.start + i
            one, rounded = (W, Q) if i is None else (W[i], Q[i])
            output = None if measured is None else output_error(one, rounded - one, _of(measured["inputs"], expert, 2))
            self.report(
                MatrixError(
                    weight=chain.name,
                    expert=expert,
                    outputs=one.shape[0],
                    inputs=one.shape[1],
                    bits=packing.form.bits(*one.shape),
                    weight_error=_ratio((rounded - one).norm(), one.norm()),
                    output_error=output,
                    tokens=None if measured is None else int(_of(measured["tokens"], expert, 0)),
                )
            )


def _pieces(chain: Chain, weight: LazyTensor) -> Iterator[InMemory]:
    """Yield the complete weight, or one expert of a stack at a time."""
    if len(weight.shape) < 3 or not chain.independent_rows:
        yield InMemory(weight.read())
        return
    complete = weight.read() if getattr(weight, "row_reader", True) is None else None
    for expert in range(weight.shape[0]):
        rows = slice(expert, expert + 1)
        yield InMemory(weight.rows(expert, expert + 1) if complete is None else complete[rows], start=expert)


def output_error(W: Tensor, D: Tensor, C: Tensor) -> float:
    """Return √(E‖D x‖² / E‖W x‖²) for inputs x with the second moments C; 0 where there were no inputs."""
    if tuple(C.shape) != (W.shape[1], W.shape[1]):
        raise CheckpointError(
            f"the statistics hold moments of {list(C.shape)} for a matrix with {W.shape[1]} inputs; they are of "
            "another model"
        )
    C = C.to(W.dtype)
    lost, whole = (((M @ C) * M).sum().clamp_min(0).sqrt() for M in (D, W))
    return _ratio(lost, whole)


def _of(measured: Tensor, expert: int | None, ndim: int) -> Tensor:
    return measured if expert is None or measured.ndim == ndim else measured[expert]


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if float(whole) > 0 else 0.0
