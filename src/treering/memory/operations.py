"""The arithmetic of one micro-batch, counted from shapes: matrix products of tokens with weights, and attention.

    products    2 N T operations forward for N weights and T tokens; as many backward for the tokens' gradient, and for
                the weights that train
    attention   4 products of queries with keys and values that a token sees: T² / 2 pairs, or T w with a window w

A block that is computed again in the backward counts its forward twice, and a model that is its own teacher once more;
the second pass of tiles is not counted. Where a config does not say how many experts a token has, all count.
"""

from dataclasses import dataclass
from math import prod

from treering.plan.plan import Plan
from treering.technique import Stage

CHOICES = ("num_experts_per_tok", "top_k_experts", "moe_topk")  # where configs write how many experts a token has
NOT_IN_PRODUCTS = ("embedding", "position", "norm", "sink")


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Floating-point operations of one micro-batch of the complete row, forward and backward."""

    products: float
    attention: float


def operations(plan: Plan, tokens: int) -> Operations:
    """Return the operations of `plan` for one micro-batch of `tokens`, one document."""
    learning = [(name, p) for name, p in plan.model.named_parameters() if p.requires_grad and p.ndim >= 2]
    again = any(technique.stage == Stage.RECOMPUTE for technique in plan.techniques) and bool(learning)
    used, in_blocks = _weights(plan)
    embeddings = {f"{module}.weight" for module in plan.anatomy.embeddings}
    share = _used_of_experts(plan)
    trained = sum(p.numel() * (share if p.ndim == 3 else 1.0) for name, p in learning if name not in embeddings)
    own_teacher = plan.teacher is None and getattr(plan.objective, "teacher", None) is not None
    products = 2 * (used * (1 + own_teacher) + again * in_blocks + (used + trained if learning else 0.0)) * tokens
    forwards = 1 + again + own_teacher
    return Operations(products=products, attention=_attention(plan, tokens, forwards, bool(learning)))


def _weights(plan: Plan) -> tuple[float, float]:
    """Return how many weights a token is multiplied with, and how many of them are in blocks."""
    share = _used_of_experts(plan)
    used = in_blocks = 0.0
    for parameter in plan.anatomy.parameters.values():
        if len(parameter.shape) < 2 or parameter.role in NOT_IN_PRODUCTS:
            continue
        count = prod(parameter.shape) * (share if parameter.role == "experts" else 1.0)
        used += count
        in_blocks += count if parameter.block is not None else 0.0
    head = plan.anatomy.head
    if head is not None and head.tied_to is not None:
        used += prod(plan.anatomy.parameters[head.tied_to].shape)
    return used, in_blocks


def _used_of_experts(plan: Plan) -> float:
    """Return which part of all experts one token goes through."""
    if not plan.anatomy.experts:
        return 1.0
    config, number = plan.model.config.get_text_config(), plan.anatomy.experts[0].number
    written = (getattr(config, name, None) for name in CHOICES)
    return next((value for value in written if isinstance(value, int)), number) / number


def _attention(plan: Plan, tokens: int, forwards: int, backward: bool) -> float:
    total = 0.0
    for one in plan.anatomy.attentions:
        window = min(one.sliding_window or tokens, tokens)
        pairs = window * (tokens - window / 2) * one.heads
        forward = 2 * pairs * (one.head_dim + one.value_dim)
        total += forward * forwards + backward * 2 * pairs * (3 * one.head_dim + 2 * one.value_dim)
    return total
