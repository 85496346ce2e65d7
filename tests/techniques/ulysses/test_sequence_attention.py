"""The plain function: attention over ranks, causal or not, with tokens that every rank has, is that of one process."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_same
from treering.core.row_messages import recorded
from treering.core.seeds import generator

HEADS = ((1, 1), (2, 1), (4, 2), (6, 2), (6, 3), (9, 3))


def drawn(name, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(0, name, *shape))


def inputs(heads, tokens, widths, batch):
    (query, key), (wide, value) = heads, widths
    shapes = ((query, wide), (key, wide), (key, value), (query, value))
    return [drawn(f"{name} {tokens}", batch, h, tokens, d) for name, (h, d) in zip("qkvg", shapes)]


def by_one(tensors, gradient, causal):
    tensors = [x.clone().requires_grad_() for x in tensors]
    out = F.scaled_dot_product_attention(*tensors, is_causal=causal, enable_gqa=True)
    out.backward(gradient)
    return [out.detach(), *(x.grad for x in tensors)]


def compared(found, wanted, what):
    flat = [torch.cat([x.reshape(-1) for x in of]) for of in (found, wanted)]
    assert_same(*flat, 1e-12, what)


def shared(lengths, transport):
    rank, own = dist.get_rank(), slice(sum(lengths[: dist.get_rank()]), sum(lengths[: dist.get_rank() + 1]))
    for i, heads in enumerate(HEADS):
        causal, batch, widths = i % 2 == 0, 1 + i % 3, ((8, 8), (8, 4))[i % 2]
        *tensors, gradient = inputs(heads, sum(lengths), widths, batch)
        wanted = [x[:, :, own] for x in by_one(tensors, gradient, causal)]
        mine = [x[:, :, own].clone().requires_grad_() for x in tensors]
        given = None if i % 2 else lengths
        out = tr.sequence_attention(*mine, causal=causal, transport=transport, lengths=given)
        out.backward(gradient[:, :, own])
        compared([out.detach(), *(x.grad for x in mine)], wanted, f"{heads} {lengths} rank {rank}")


@pytest.mark.parametrize(
    ("lengths", "transport"),
    [((5, 5), "collective"), ((1, 8, 3), "paired"), ((0, 7, 4), "collective"), ((3, 1, 2, 6), "collective")],
)
def test_each_rank_gets_its_part(lengths, transport):
    on_ranks(len(lengths), shared, lengths, transport)


def with_text(lengths, more):
    own = slice(sum(lengths[: dist.get_rank()]), sum(lengths[: dist.get_rank() + 1]))
    for heads, at in itertools.product(HEADS, ("start", "end")):
        image, text = inputs(heads, sum(lengths), (8, 4), 2), inputs(heads, more, (8, 4), 2)
        order = (lambda i, t: [t, i]) if at == "start" else (lambda i, t: [i, t])
        complete = [torch.cat(order(i, t), dim=2) for i, t in zip(image, text)]
        wanted = by_one(complete[:3], complete[3], causal=False)
        sizes = order(sum(lengths), more)
        parts = [dict(zip(order("image", "text"), x.split(sizes, dim=2))) for x in wanted]
        mine, texts = ([x.clone().requires_grad_() for x in of] for of in ([x[:, :, own] for x in image[:3]], text[:3]))
        out, of_text = tr.sequence_attention(*mine, replicated=tuple(texts), replicated_at=at)
        # The text counts once: each rank has a part of its loss.
        share = torch.zeros_like(text[3])
        share[:, dist.get_rank() :: dist.get_world_size()] = 1
        torch.autograd.backward([out, of_text], [image[3][:, :, own], text[3] * share])
        for x in texts:
            dist.all_reduce(x.grad)
        found = [out.detach(), *(x.grad for x in mine), of_text.detach(), *(x.grad for x in texts)]
        own_parts = [part["image"][:, :, own] for part in parts] + [part["text"] for part in parts]
        compared(found, own_parts, f"{heads} {at}")


@pytest.mark.parametrize(("lengths", "more"), [((4, 3), 2), ((2, 6, 1), 5), ((1, 1, 1, 2), 1)])
def test_tokens_that_every_rank_has_are_computed_once_and_equal_everywhere(lengths, more):
    on_ranks(len(lengths), with_text, lengths, more)


def counted():
    tensors = [x[:, :, :4].requires_grad_() for x in inputs((4, 2), 8, (8, 8), 1)[:3]]
    with recorded() as record:
        out = tr.sequence_attention(*tensors, lengths=(4, 4))
        out.sum().backward()
    assert record.calls == {"all_to_all_rows": 4}
    with torch.no_grad(), recorded() as record:
        tr.sequence_attention(*tensors, lengths=(4, 4))
    assert record.calls == {"all_to_all_rows": 2}
    half = [x.detach() for x in tensors]
    own = tr.sequence_attention(*half, lengths=(4, 4), attend=lambda q, k, v: torch.zeros_like(q))
    assert not own.any()
    with pytest.raises(tr.DataError, match="let it do both"):
        tr.sequence_attention(*half, lengths=(4, 4), attend=lambda q, k, v: q, causal=True)
    # A loss of the text on one rank only.
    texts = [torch.randn(1, x.shape[1], 2, 8, dtype=torch.float64, requires_grad=True) for x in half]
    mine = [x.clone().requires_grad_() for x in half]
    out, of_text = tr.sequence_attention(*mine, lengths=(4, 4), replicated=tuple(texts))
    loss = out.sum() + (of_text.sum() if dist.get_rank() == 0 else 0)
    loss.backward()
    for wrong, message in (
        ({"lengths": (4, 5)}, "give the number of tokens of each rank"),
        ({"lengths": (4,)}, "for 2 ranks"),
        ({"replicated": tuple(x[..., :4] for x in half)}, "they are parts of one attention"),
    ):
        if dist.get_rank() == 1 or wrong.get("lengths") != (4, 5):
            with pytest.raises(tr.DataError, match=message):
                tr.sequence_attention(*half, **wrong)
    with pytest.raises(tr.DataError, match="that the number of key heads divides"):
        tr.sequence_attention(half[0][:, :3], *half[1:])


def test_two_messages_each_way_and_what_does_not_fit_is_refused():
    on_ranks(2, counted)


def coded():
    rank, lengths = dist.get_rank(), (9, 12)
    own = slice(9 * rank, 9 + 12 * rank)
    image, text = inputs((4, 2), 21, (16, 16), 2), inputs((4, 2), 5, (16, 16), 2)
    mine, exact = [x[:, :, own] for x in image[:3]], {"lengths": lengths, "replicated": tuple(text[:3])}
    wanted = tr.sequence_attention(*mine, **exact)
    with recorded() as plain:
        tr.sequence_attention(*mine, **exact)
    with recorded() as record:
        found = tr.sequence_attention(*mine, **exact, codec="int8")
    for one, other in zip(found, wanted):
        assert 0 < (one - other).norm() / other.norm() < 0.02
    assert sum(record.bytes.values()) < 0.3 * sum(plain.bytes.values())
    with pytest.raises(tr.ConfigError, match="is no codec"):
        tr.sequence_attention(*mine, **exact, codec="int4")


def test_what_is_sent_can_be_coded():
    on_ranks(2, coded)


def of_the_page():
    """The block of docs/sequence-parallel.md on several ranks and on one."""
    text = (Path(__file__).parents[3] / "docs" / "sequence-parallel.md").read_text(encoding="utf-8")
    block = next(part for part in text.split("```python\n") if part.startswith("class Block")).partition("\n```")[0]
    names = {"torch": torch, "tr": tr}
    exec(compile(block, "docs/sequence-parallel.md", "exec"), names)
    torch.manual_seed(0)
    model = names["Block"]().double()
    image, text = drawn("image", 2, 11, 64), drawn("text", 2, 3, 64)
    one = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    wanted = model(image, text, one)
    lengths = [5, 2, 4]
    own = slice(sum(lengths[: dist.get_rank()]), sum(lengths[: dist.get_rank() + 1]))
    found = model(image[:, own], text, None, lengths)
    compared([x.detach() for x in found], [wanted[0][:, own].detach(), wanted[1].detach()], "the block of the page")


def test_the_block_of_the_page_runs_on_three_ranks():
    on_ranks(3, of_the_page)
