"""Documents may carry an exchange, which is called around every attention, and again where a block is recomputed."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import treering as tr
from tests.attention.packs import LENGTHS, packed, tokens
from tests.ranks import on_ranks
from tests.same import assert_all_same, assert_same
from tests.zoo import build
from treering.anatomy import examine
from treering.attention import Documents, install
from treering.core.seeds import generator
from treering.technique import Site, recompute_state

# what the CPU computes by one sdpa call a document, and in chunks for a window, a softcap and sinks
KERNELS = ["llama", "mistral", "gemma2", "gpt_oss"]
RECOMPUTES = {"no recompute": None, "recompute": tr.Recompute(), "offload": tr.Recompute(offload="cpu")}
ULYSSES = (5, 1, 70, 13, 1, 30)  # 120 tokens: the cut between two ranks is inside a document
LAYERS = 2


def model_of(arch: str, recompute: str) -> nn.Module:
    model = build(arch)
    install(model)
    technique = RECOMPUTES[recompute]
    if technique is not None:
        technique.apply(model, Site(anatomy=examine(model), mesh=None))
    return model


def results(model: nn.Module, given: dict[str, Any], part: slice = slice(None)) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients of a loss that tells all elements apart; `part` of the tokens of a row."""
    logits = model(**given).logits
    shape = (1, sum(LENGTHS), logits.shape[-1])
    (logits * torch.randn(shape, generator=generator(3, "gradient"))[:, part]).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Permuted:
    """Reverses the key heads, each with the query heads that share it, and their sinks."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def around(self, attend: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        self.calls[recompute_state()] += 1
        shared = query.shape[1] // key.shape[1]
        query = query.unflatten(1, (-1, shared)).flip(1).flatten(1, 2)
        sinks = None if sinks is None else sinks.unflatten(0, (-1, shared)).flip(0).flatten()
        return self.back(attend(query, key.flip(1), value.flip(1), sinks), shared)

    def back(self, out: Tensor, shared: int) -> Tensor:
        return out.unflatten(1, (-1, shared)).flip(1).flatten(1, 2)


@pytest.mark.parametrize("recompute", RECOMPUTES)
@pytest.mark.parametrize("arch", KERNELS)
def test_a_permutation_of_heads_that_is_undone_changes_no_bit(arch, recompute):
    given = packed(tokens())
    wanted, wanted_gradients = results(model_of(arch, recompute), given)
    exchange = Permuted()
    given["documents"] = given["documents"].exchanged(exchange)
    found, gradients = results(model_of(arch, recompute), given)
    assert_same(found, wanted)
    assert_all_same(gradients, wanted_gradients)
    passes = ("forward",) if recompute == "no recompute" else ("forward", "recompute")
    assert exchange.calls == dict.fromkeys(passes, LAYERS)


@pytest.mark.parametrize("arch", ["llama", "gpt_oss"])
def test_a_permutation_that_is_not_undone_is_seen(arch):
    class Undone(Permuted):
        def back(self, out: Tensor, shared: int) -> Tensor:
            return out

    given = packed(tokens())
    wanted, _ = results(model_of(arch, "no recompute"), given)
    found, _ = results(model_of(arch, "no recompute"), given | {"documents": given["documents"].exchanged(Undone())})
    assert not torch.allclose(found, wanted)


class _AllToAll(torch.autograd.Function):
    """Splits dimension `split` over the ranks and joins what comes from them along dimension `joined`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: int, joined: int) -> Tensor:
        ctx.dims = split, joined
        sent = torch.stack(x.chunk(dist.get_world_size(), dim=split))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        return torch.cat(received.unbind(), dim=joined)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        split, joined = ctx.dims
        return _AllToAll.apply(gradient, joined, split), None, None


class Heads:
    """Ulysses in its simplest form: from a part of the tokens of all heads to all tokens of a part of the heads."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def around(self, attend: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        self.calls[recompute_state()] += 1
        query, key, value = (_AllToAll.apply(x, 1, 2) for x in (query, key, value))
        sinks = None if sinks is None else sinks.chunk(dist.get_world_size())[dist.get_rank()]
        return _AllToAll.apply(attend(query, key, value, sinks), 2, 1)


def pieces(lengths: tuple[int, ...], part: slice) -> list[int]:
    """The lengths of what a part of a row holds of each document."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    held = [min(a + n, part.stop) - max(a, part.start) for a, n in zip(starts, lengths)]
    return [n for n in held if n > 0]


def sequence_parallel(recompute: str) -> list[tuple[Tensor, dict[str, Tensor]]]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    share = sum(ULYSSES) // ranks
    part = slice(rank * share, (rank + 1) * share)
    found = []
    for arch in KERNELS:
        given, exchange = packed(tokens(ULYSSES), ULYSSES), Heads()
        given |= {key: given[key][:, part] for key in ("input_ids", "position_ids")}
        outside = Documents.of(pieces(ULYSSES, part))
        given["documents"] = outside.exchanged(exchange, inside=given["documents"])
        logits, gradients = results(model_of(arch, recompute), given, part)
        for gradient in gradients.values():
            dist.all_reduce(gradient)
        assert exchange.calls["recompute"] == (LAYERS if recompute == "recompute" else 0)
        found.append((logits, gradients))
    return found


@pytest.mark.parametrize("recompute", ["no recompute", "recompute"])
def test_heads_exchanged_between_two_ranks_give_what_one_process_gives(recompute):
    wanted = [results(model_of(arch, "no recompute"), packed(tokens(ULYSSES), ULYSSES)) for arch in KERNELS]
    first, second = on_ranks(2, sequence_parallel, recompute)
    for arch, (logits, gradients), one, other in zip(KERNELS, wanted, first, second):
        assert_same(torch.cat([one[0], other[0]], dim=1), logits, 1e-6, arch)
        assert_all_same(one[1], gradients, 1e-6)


def test_the_exchange_and_the_documents_inside_go_to_a_device_along():
    exchange, inside = Permuted(), Documents.of([7, 5])
    documents = Documents.of([6]).exchanged(exchange, inside=inside)
    moved = documents.to("meta")
    assert moved.exchange is exchange and moved.lengths == (6,)
    assert moved.cu_seqlens.is_meta and moved.inside.cu_seqlens.is_meta and moved.inside.lengths == (7, 5)
    assert documents.to("cpu") is documents


def test_documents_must_fit_the_row_outside_and_inside():
    model, ids = model_of("llama", "no recompute"), tokens((12,))
    given = {"input_ids": ids, "position_ids": torch.arange(12)[None], "use_cache": False}
    for outside, inside in ((11, 12), (12, 11)):
        documents = Documents.of([outside]).exchanged(Permuted(), inside=Documents.of([inside]))
        with pytest.raises(tr.DataError, match="hold 11 tokens but the packed row has 12"):
            model(**given, documents=documents)


def test_an_exchange_does_not_compile_a_block_again():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()  # after too many models of one class it would stop compiling, without an error
    model, counter = model_of("mistral", "no recompute"), CompileCounter()
    for block in model.model.layers:
        block.compile(backend=counter, dynamic=False)
    counts = []
    for lengths in (LENGTHS, LENGTHS[::-1]):
        given = packed(tokens(lengths), lengths)
        given["documents"] = given["documents"].exchanged(Permuted())
        results(model, given)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0
