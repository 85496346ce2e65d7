"""The peak of a step of a Llama in one line of arithmetic: an independent check of the traced peak.

    states + gathered + head and loss, or
    states + gathered + max(kept of all blocks, gradients of all) + what one block needs in its backward

S tokens, H width, I width of the MLP, V vocabulary, b bytes of the arithmetic. The factors are those of a block of
transformers' Llama: 6 I / H + 12.6 tensors of S × H × b in its backward, 4 I / H + 10.5 of them kept without recompute.
"""

from dataclasses import dataclass
from typing import Literal

from torch.distributed.tensor import DTensor

from treering.plan.explain import figures
from treering.plan.plan import Plan

Tiles = Literal["none", "mlp", "block"]
TILED: dict[Tiles, float] = {"mlp": 21.8, "block": 9.4}
TILE = 2**30  # bytes: a tile's usual budget
LOGIT = 12  # bytes at the peak of a plain loss: float32 logits and their gradient, and both in half precision


@dataclass(frozen=True, kw_only=True)
class Formula:
    """`states`: parameters and optimizer on the device. `gradients`: of this rank. `unit`: parameters of a block."""

    blocks: int
    states: float
    gradients: float
    unit: int
    head: int
    hidden: int
    inner: float
    vocabulary: int
    width: int  # bytes of the arithmetic
    whole: float  # gradients as they are made, of all parameters trained, per block; 0 where they are all on this rank
    recompute: bool = False
    offload: bool = False
    tiles: Tiles = "none"
    tiled_loss: bool = False

    def peak(self, length: int) -> float:
        token = length * self.hidden * self.width
        kept = 4 * self.inner / self.hidden + 10.5
        if self.recompute:
            kept = 1.0
        held = 2.0 if self.offload and self.recompute else kept * self.blocks
        block = TILED.get(self.tiles, 6 * self.inner / self.hidden + 12.6)
        more = TILE if self.tiles != "none" else 0
        logits: float = LOGIT * length * self.vocabulary
        if self.tiled_loss:
            logits = TILE + 9 * self.head + 6.5 * token
        gathered = 2 * self.width * self.unit
        forward = held * token + logits + (self.width * self.head if self.whole else 0)
        backward = max(held * token, self.gradients) + block * token + more + gathered + self.whole
        return self.states + max(forward, backward)


def formula(
    plan: Plan, *, width: int, recompute: bool, offload: bool, tiles: Tiles, tiled_loss: bool, host: bool
) -> Formula | None:
    """`plan`, drafted without weights. `host`: parameters, gradients and optimizer rest in host memory.

    None for blocks of experts: how many tokens each gets is up to the model.
    """
    if plan.anatomy.experts:
        return None
    anatomy, n = plan.anatomy, figures(plan)
    inside = [p for p in anatomy.parameters.values() if p.block is not None]
    unit = sum(_count(p.shape) for p in inside) // max(1, len(anatomy.blocks))
    embedding = plan.model.get_input_embeddings().weight
    vocabulary, hidden = embedding.shape
    trained = n.trained / max(1, n.parameters)
    inner = max((x.outputs for x in anatomy.linears if x.role == "mlp"), default=4 * hidden)
    sharded = any(isinstance(p, DTensor) for p in plan.model.parameters())
    return Formula(
        blocks=len(anatomy.blocks),
        states=0 if host else n.stored + n.optimizer,
        gradients=0 if host else n.gradients,
        unit=unit,
        head=vocabulary * hidden,
        hidden=hidden,
        inner=inner,
        vocabulary=vocabulary,
        width=width,
        whole=(width + 4) * unit * trained if sharded else 0,
        recompute=recompute,
        offload=offload,
        tiles=tiles,
        tiled_loss=tiled_loss,
    )


def _count(shape: tuple[int, ...]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product
