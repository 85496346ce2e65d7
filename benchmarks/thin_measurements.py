"""What short measurements protect of a model with experts, and whether rules for them help.

    python -m benchmarks.thin_measurements [--quick] [--machine cpu2]

A small model with 8 experts (2 of them for a token) can copy and knows 64 facts; it learns 64 more in 80 steps under
`osft`, measured on ever less text. Rules that were tried for a thin measurement of a matrix with M inputs and n tokens:

    pooled τ   A_e ← (n_e A_e + τ M A) / (n_e + τ M),  A the mean over all experts of the stack
    even τ     A ← (n A + τ M ē I) / (n + τ M),  ē the mean energy

Reported is the rise of the old text's loss where a curve over six learning rates reaches 90 % of the new facts.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import treering as tr
from benchmarks.influence_text import cache, one_thread
from benchmarks.quality import symbols
from benchmarks.quality.learners import Composed, Method, osft
from benchmarks.quality.model import Small, batch, drawn, exact, learn, pretrained
from benchmarks.quality.runs import crossing
from benchmarks.rows import Row, row, write
from treering.plan.batches import cross_entropy, with_targets

SIZE = symbols.Size(width=64, middle=96, layers=2, facts=64, base_steps=900, steps=80, tasks=1, rows=32)
EXPERTS, RATES = 8, (2.8e-4, 4e-4, 5.7e-4, 8e-4, 1.1e-3, 1.6e-3)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
Moments = Mapping[str, Mapping[str, Tensor]]


def base(seed: int) -> Small:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=symbols.SYMBOLS + 3, hidden_size=SIZE.width, intermediate_size=SIZE.middle,
        moe_intermediate_size=SIZE.middle, num_experts=EXPERTS, num_experts_per_tok=2, num_hidden_layers=SIZE.layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=32, norm_topk_prob=True,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None, router_aux_loss_coef=0.0,
    )  # fmt: skip
    file = cache() / f"thin-measurements-{seed}.safetensors"
    return pretrained(config, symbols.old(SIZE, seed), SIZE.base_steps, 2e-3, seed, file)


def measured(small: Small, rows: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """Return A in float64 and tokens by weight, measured on so many copies and facts."""
    known = symbols.facts(SIZE.facts, seed, 0)
    texts = symbols.copies(rows, seed, "ring"), (known[0][:rows], known[1][:rows])
    found = small.measured([batch(*one) | {"real": torch.ones_like(one[0], dtype=torch.bool)} for one in texts])
    return {w: {"inputs": found[w]["inputs"].double(), "tokens": found[w]["tokens"]} for w in found}


def pooled(tau: float, A: Tensor, tokens: Tensor) -> Tensor:
    if A.ndim == 2:
        return A
    mean, prior = torch.einsum("eij,e->ij", A, tokens) / tokens.sum(), tau * A.shape[-1]
    return (A * tokens[:, None, None] + prior * mean) / (tokens + prior)[:, None, None]


def even(tau: float, A: Tensor, tokens: Tensor) -> Tensor:
    flat = A.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(A.shape[-1], dtype=A.dtype)
    count, prior = tokens[..., None, None], tau * A.shape[-1]
    return (A * count + prior * flat) / (count + prior)


RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as measured": lambda A, n: A,
    "pooled .25": lambda A, n: pooled(0.25, A, n),
    "pooled 1": lambda A, n: pooled(1.0, A, n),
    "pooled 4": lambda A, n: pooled(4.0, A, n),
    "even .25": lambda A, n: even(0.25, A, n),
    "even 1": lambda A, n: even(1.0, A, n),
}


def ruled(moments: Moments, rule: Callable[[Tensor, Tensor], Tensor]) -> Moments:
    """Return the moments after a rule; what no token reached has a moment from now on where the rule gives it one."""
    return {
        w: {"inputs": rule(one["inputs"], one["tokens"].double()).float(), "tokens": one["tokens"].clamp_min(1)}
        for w, one in moments.items()
    }


def rise(small: Small, method: Method, statistics: Any, seed: int) -> float:
    """Return the rise of the old text's loss, nats a token, where 90 % are learned; NaN: no rate learns as much."""
    new, old = symbols.facts(SIZE.facts, seed, 1), symbols.facts(SIZE.facts, seed, 0)
    kept = symbols.copies(256, seed, "held out"), old
    points = []
    for lr in RATES:
        order = drawn(*new, SIZE.rows, seed + 1)
        learned = learn(small, method, statistics, lr, order, SIZE.steps, "cosine")
        cost = sum(_loss(learned, one) - _loss(small, one) for one in kept) / len(kept)
        points.append((exact(learned.fresh().eval(), *new), cost))
        if points[-1][0] > 0.9:  # faster ones forget more
            break
    found = crossing(points, 0.9)
    return math.nan if found is None else found


@torch.no_grad()
def _loss(small: Small, rows: symbols.Rows) -> float:
    one = batch(*rows)
    return float(cross_entropy(small.fresh().eval(), with_targets(one))) / one["count"]


def full(model: Any, statistics: Any, lr: float) -> Composed:
    return Composed(model, [tr.Full(train=LINEARS)], None, lr)


def rows(seeds: int, lengths: tuple[int, ...], command: str) -> Iterator[Row]:
    common: dict[str, Any] = {"unit": "nats", "packages": ("treering", "torch", "transformers"), "command": command}
    protected = osft(unmeasured="unprotected")
    models = {seed: base(seed) for seed in range(seeds)}
    figure = "rise of old text where 90 % of 64 facts are learned"
    yield row(figure, "full fine-tuning", [rise(small, full, None, seed) for seed, small in models.items()], **common)
    for length in lengths:
        moments = {seed: measured(small, length, seed) for seed, small in models.items()}
        stacks = [one["tokens"] for by in moments.values() for one in by.values() if one["tokens"].ndim]
        per_input = float(torch.stack([tokens.double().mean() for tokens in stacks]).mean()) / SIZE.width
        for name, rule in RULES.items():
            found = [rise(models[seed], protected, ruled(moments[seed], rule), seed) for seed in models]
            yield row(figure, f"osft, {per_input:.1f} tokens an input of an expert, {name}", found, **common)
            sys.stderr.write(f"{length} {name}: {found}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two lengths")
    parser.add_argument("--machine", default="cpu2")
    options = parser.parse_args()
    command = "python -m benchmarks.thin_measurements" + (" --quick" if options.quick else "")
    with one_thread():
        made = list(rows(1 if options.quick else 3, (24, 8) if options.quick else (64, 24, 8), command))
    write("thin_measurements", options.machine, made)


if __name__ == "__main__":
    main()
