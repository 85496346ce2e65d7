"""Rows sent to the owners of their experts and back: values and gradients of a plain loop over all ranks' tokens."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ranks import on_ranks
from tests.same import assert_same
from treering.core.module_forward import install
from treering.core.row_messages import all_to_all_rows
from treering.experts import reference
from treering.experts.dispatch import DispatchedExperts, ExpertExchange
from treering.experts.grouped_forward import GroupedForward
from treering.experts.routing import route

EXPERTS, WIDTH, INNER, CHOICES = 6, 5, 7, 2


class Toy(nn.Module):
    """Experts with transformers' interface, of which this rank has those from `first` on."""

    has_gate, has_bias, is_transposed = False, False, False

    def __init__(self, first, number):
        super().__init__()
        self.num_experts = EXPERTS
        up, down = matrices()
        self.up_proj = nn.Parameter(up[first : first + number].clone())
        self.down_proj = nn.Parameter(down[first : first + number].clone())

    act_fn = staticmethod(torch.tanh)

    def _apply_gate(self, x):
        return x


def matrices():
    generator = torch.Generator().manual_seed(7)
    up = torch.randn(EXPERTS, INNER, WIDTH, generator=generator, dtype=torch.float64)
    return up, torch.randn(EXPERTS, WIDTH, INNER, generator=generator, dtype=torch.float64)


def tokens(rank, routing):
    """(hidden, experts of each token, weights) of a rank."""
    generator = torch.Generator().manual_seed(rank)
    number = {"empty": 0 if rank == 1 else 4}.get(routing, 3 + 2 * rank)
    hidden = torch.randn(number, WIDTH, generator=generator, dtype=torch.float64)
    highest = 2 if routing == "first" else EXPERTS
    scores = torch.rand(number, highest, generator=generator, dtype=torch.float64)
    weights, chosen = scores.topk(CHOICES, -1)
    return hidden, chosen, weights


def computed(routing):
    """The output of this rank's tokens, and the gradients of hidden, weights and both stacks of its experts."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    each = EXPERTS // ranks
    module = Toy(rank * each, each)
    grouped = GroupedForward(module)
    install(grouped)
    install(DispatchedExperts(module, grouped, dist.group.WORLD, EXPERTS))
    hidden, chosen, weights = tokens(rank, routing)
    hidden.requires_grad_()
    weights.requires_grad_()
    out = module(hidden, chosen, weights)
    (out * torch.arange(WIDTH)).sum().backward()
    return out, hidden.grad, weights.grad, module.up_proj.grad, module.down_proj.grad


def wanted(routing, ranks):
    hidden, chosen, weights = zip(*(tokens(rank, routing) for rank in range(ranks)))
    up, down = (stack.requires_grad_() for stack in matrices())
    for value in (*hidden, *weights):
        value.requires_grad_()
    out = reference.dispatched(hidden, chosen, weights, lambda e, x: torch.tanh(x @ up[e].mT) @ down[e].mT, EXPERTS)
    sum((one * torch.arange(WIDTH)).sum() for one in out).backward()
    each = EXPERTS // ranks
    return [
        (out[r], hidden[r].grad, weights[r].grad, *(w.grad[r * each : (r + 1) * each] for w in (up, down)))
        for r in range(ranks)
    ]


@pytest.mark.parametrize(("ranks", "routing"), [(2, "uneven"), (2, "first"), (3, "first"), (3, "empty")])
def test_outputs_and_gradients_are_those_of_a_plain_loop(ranks, routing):
    for rank, (found, want) in enumerate(zip(on_ranks(ranks, computed, routing), wanted(routing, ranks))):
        for what, one, other in zip(("out", "hidden", "weights", "up", "down"), found, want):
            assert_same(one, other, 1e-12, f"{what} of rank {rank}")


def counted():
    """Collectives of a forward and of its backward."""
    calls = []
    real = dist.all_to_all_single

    def counting(*args, **kwargs):
        calls.append(args[0].shape)
        return real(*args, **kwargs)

    dist.all_to_all_single = counting
    try:
        hidden, chosen, _ = tokens(dist.get_rank(), "uneven")
        routing = route(chosen, EXPERTS)
        exchange = ExpertExchange.of(routing, dist.group.WORLD)
        rows = hidden.requires_grad_()[routing.tokens]
        back = exchange.to_senders(exchange.to_owners(rows))
        forward = len(calls)
        back.sum().backward()
    finally:
        dist.all_to_all_single = real
    assert torch.equal(back, rows) and torch.equal(hidden.grad, torch.full_like(hidden, CHOICES))
    return forward, len(calls) - forward, sum(exchange.received), len(exchange.experts), int(exchange.experts.max())


def test_there_is_one_message_each_way_and_pass_besides_the_counts():
    for forward, backward, received, experts, last in on_ranks(2, counted):
        assert (forward, backward) == (3, 2) and received == experts and last == EXPERTS // 2 - 1


def checked():
    rows = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    arguments = (rows, [2, 2], [2, 2], dist.group.WORLD.group_name)
    torch.library.opcheck(all_to_all_rows, arguments, test_utils=("test_schema", "test_faketensor"))
    for dtype in (torch.bfloat16, torch.uint8, torch.int32):
        given = torch.arange(4).to(dtype).unsqueeze(1)
        assert torch.equal(all_to_all_rows(given, *arguments[1:])[:2], given[2 * dist.get_rank() :][:2])
    return True


def test_the_operator_has_shapes_without_values_and_sends_any_dtype():
    assert on_ranks(2, checked) == [True, True]


def planned():
    chosen = torch.zeros(5, CHOICES, dtype=torch.long)  # all of one expert: shapes alone do not show it
    with FakeTensorMode() as mode:
        exchange = ExpertExchange.of(route(mode.from_tensor(chosen), EXPERTS), dist.group.WORLD)
        rows = exchange.to_owners(mode.from_tensor(torch.zeros(5 * CHOICES, WIDTH)))
    return exchange.sent, exchange.received, tuple(rows.shape), tuple(exchange.experts.shape)


def test_memory_is_planned_as_if_each_rank_got_equally_many_rows():
    for found in on_ranks(3, planned):
        assert found == ((4, 3, 3), (4, 4, 4), (12, WIDTH), (12,))
