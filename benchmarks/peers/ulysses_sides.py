"""Both sides of the comparison with DeepSpeed's Ulysses: one layer's attention over ranks, on the same tensors.

Inputs and outputs are as a block of transformers has them: q, k and v as views of [B, t, H, D], the output [B, t, H D],
of which each rank has its share of the tokens.

Shapes: B rows (1), H query heads, K key heads, t tokens of a rank, T of all ranks, D width of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from treering.attention import attend
from treering.core.seeds import generator
from treering.techniques.ulysses.ranks import SequenceRanks
from treering.techniques.ulysses.shares import Grid, Ranges

THEIRS, OURS, MESSAGES = "deepspeed", "ours", "messages"


@dataclass(frozen=True)
class Case:
    heads: int
    key_heads: int
    width: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.heads} query and {self.key_heads} key heads of {self.width}, {self.tokens:,} tokens"


class Side(Protocol):
    """What a rank does around and in one attention."""

    ranges: Ranges  # of the tokens that this rank has

    def __call__(self, query_BtHD: Tensor, key_BtKD: Tensor, value_BtKD: Tensor) -> Tensor: ...


class Theirs:
    """DeepSpeed's module as it registers it with transformers: sdpa inside, sequences of any length."""

    def __init__(self, case: Case, group: Any, *, free: bool = False):
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        ranks, rank = group.size(), group.rank()
        nothing = FreeAttention()

        def no_attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, **_: Any) -> Any:
            return nothing(q, k, v).transpose(1, 2), None

        self.module: Any = UlyssesSPAttentionHF(
            attn=no_attention if free else sdpa_attention_forward,
            batch_size=1,
            attn_head_count=case.heads,
            attn_head_size=case.width,
            kv_head_count=case.key_heads,
            num_hidden_layers=1,
            process_group=group,
            seq_length_is_variable=True,
        )
        self.layer: Any = nn.Module()  # the attention layer that transformers' function reads these from
        self.layer.num_key_value_groups, self.layer.is_causal = case.heads // case.key_heads, True
        each = case.tokens // ranks
        self.ranges: Ranges = (range(rank * each, (rank + 1) * each),)
        self.position_ids = torch.arange(rank * each, (rank + 1) * each)[None]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tensors = (x.transpose(1, 2) for x in (query, key, value))
        out: Tensor = self.module(self.layer, *tensors, None, position_ids=self.position_ids)[0]
        return out


class Ours:
    """The exchange with `attend` inside, one document, as the registered attention function calls both."""

    def __init__(self, case: Case, ranks: SequenceRanks, *, free: bool = False):
        documents = ranks.documents([case.tokens], "cpu")
        assert documents.exchange is not None
        self.around, inside = documents.exchange.around, documents.inside or documents
        nothing = FreeAttention()
        self.attend: Any = (
            (lambda q, k, v, s: nothing(q, k, v)) if free else (lambda q, k, v, s: attend(q, k, v, inside, sinks_H=s))
        )
        self.ranges = ranks.tokens(case.tokens)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tensors = (x.transpose(1, 2) for x in (query, key, value))
        return self.around(self.attend, *tensors, None).transpose(1, 2).contiguous().flatten(2)


class FreeAttention:
    """An attention that takes no time: output and gradients lie ready, in memory as torch's kernel leaves them."""

    def __init__(self) -> None:
        self.ready: dict[Any, Tensor] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _Free.apply(query, key, value, self)

    def of(self, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
        if (name, shape) not in self.ready:
            B, H, T, D = shape
            self.ready[name, shape] = torch.ones(B, T, H, D, dtype=dtype).transpose(1, 2)
        return self.ready[name, shape].detach()


class _Free(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ready: FreeAttention) -> Tensor:
        ctx.ready, ctx.shapes, ctx.dtype = ready, [tuple(x.shape) for x in (query, key, value)], query.dtype
        return ready.of(ctx.shapes[0], query.dtype, "out")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(ctx.ready.of(shape, ctx.dtype, f"gradient {i}") for i, shape in enumerate(ctx.shapes)), None


class MessagesOnly:
    """What our exchange sends and nothing else: no faster one is possible with these messages on this host."""

    def __init__(self, case: Case, group: Any):
        tokens = case.tokens // group.size()
        inputs, output = (case.heads + 2 * case.key_heads) * case.width, case.heads * case.width
        self.sent = [torch.ones(tokens * width, dtype=case.dtype) for width in (inputs, output, output, inputs)]
        self.group = group

    def __call__(self) -> None:
        for sent in self.sent:
            dist.all_to_all_single(torch.empty_like(sent), sent, group=self.group)


def empty(case: Case, ranges: Ranges) -> tuple[list[Tensor], Tensor]:
    """Return what `tensors` returns, with any values."""
    tokens = sum(map(len, ranges))
    q, k, v, gradient = (
        torch.zeros(1, tokens, heads, case.width, dtype=case.dtype)
        for heads in (case.heads, case.key_heads, case.key_heads, case.heads)
    )
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_()], gradient.flatten(2)


def tensors(case: Case, ranges: Ranges) -> tuple[list[Tensor], Tensor]:
    """Return q, k and v [B, t, H, D] of the tokens in `ranges`, and the gradient of the output [B, t, H D]."""
    own = torch.cat([torch.arange(part.start, part.stop) for part in ranges])
    shapes = [(case.heads,), (case.key_heads,), (case.key_heads,), (case.heads,)]
    q, k, v, gradient = (
        torch.randn(1, case.tokens, *shape, case.width, generator=generator(0, str(case), i))[:, own].to(case.dtype)
        for i, shape in enumerate(shapes)
    )
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_()], gradient.flatten(2)


def truth(case: Case) -> list[Tensor]:
    """Return output and gradients of all tokens, of one process."""
    inputs, gradient = tensors(case, (range(case.tokens),))
    q, k, v = (x.transpose(1, 2) for x in inputs)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


def results(side: Side, case: Case) -> list[Tensor]:
    """Return output and gradients of this rank's tokens."""
    inputs, gradient = tensors(case, side.ranges)
    out = side(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The worst over the tensors, relative to the largest element of each."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


def named(grid: Grid) -> str:
    return f"{grid.heads} x {grid.gathered}"


def sequence_ranks(grid: Grid, backend: str) -> tuple[SequenceRanks, list[Any]]:
    """The ranks as a grid, over process groups of their own, and this rank's groups; every rank makes all of them."""
    made: dict[tuple[int, ...], Any] = {}

    def group(members: list[int]) -> Any:
        if tuple(members) not in made:
            made[tuple(members)] = dist.new_group(members, backend=backend)
        return made[tuple(members)]

    rank = dist.get_rank()
    row, column = grid.place(rank)
    rows = [group([r * grid.heads + u for u in range(grid.heads)]) for r in range(grid.gathered)]
    columns = [group([r * grid.heads + u for r in range(grid.gathered)]) for u in range(grid.heads)]
    own = [rows[row], columns[column]]
    names = {"row": rows[row].group_name, "column": columns[column].group_name}
    return SequenceRanks(grid=grid, rank=rank, **names), [group for group in own if group.size() > 1]


def step(side: Side, case: Case) -> Callable[[], None]:
    """A forward and a backward."""
    inputs, gradient = empty(case, side.ranges)
    return lambda: void(torch.autograd.grad(side(*inputs), inputs, gradient))


def void(_: Any) -> None: ...
