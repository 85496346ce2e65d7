"""`communication: cached` of form `update`: rows go to the rank that keeps the operators, and all else is the same."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import distribute_tensor

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same, assert_same
from tests.techniques.osft.measured import moments
from tests.toy import rows, train, weights
from tests.zoo import build
from treering.anatomy.matrices import Matrix
from treering.core.owners import assign
from treering.core.sharded import gather, meta_rows, put
from treering.core.topology import data_rank, parameter_mesh
from treering.techniques.osft.protection.operators import Operator, OperatorShape, operator_shapes
from treering.techniques.osft.update.operator_buffers import OperatorBuffers
from treering.techniques.osft.update.update_steps import UpdateSteps

CASES = {
    "inputs": tr.OSFT(communication="cached", form="update"),
    "both": tr.OSFT(communication="cached", protect="both", strength="hard", ratio=0.3),
    "weights": tr.OSFT(communication="cached", protect="weights", ratio=0.3, keep_initial=True),
}


def composed(case, mesh, folder):
    model = build("llama", dtype=torch.float64)
    techniques = [CASES[case]] if mesh is None else [CASES[case], tr.Shard()]
    return tr.compose(model, techniques, mesh=mesh, prepared=folder, statistics=moments(model, CASES[case]))


def trained(cases, sharding, folder):
    mesh = None if sharding is None else tr.mesh(**sharding)
    rank, ranks = data_rank(mesh)
    found = {}
    for case in cases:
        run = composed(case, mesh, folder)
        before = set(run.model.state_dict())
        decay = 0.1 if CASES[case].keep_initial else 0.0
        steps = [rows(4, seed=i)[rank::ranks] for i in range(3)]
        train(run, steps, torch.optim.AdamW, lr=1e-2, weight_decay=decay)
        assert set(run.model.state_dict()) == before
        found[case] = weights(run), run.metrics(), sorted(run.plan.owned), leak(run)
    return found


def leak(run):
    """Of weights moved as an optimizer moves them that nobody retracts."""
    with torch.no_grad():
        for _, p in run.trainable():
            p.add_(0.01)
    return run.metrics().get("osft/leak", 0.0)


@pytest.mark.parametrize(
    ("sharding", "cases"),
    [
        ({"shard": 2}, ("inputs", "both")),
        ({"shard": 3}, ("weights",)),
        ({"shard": 4}, ("inputs",)),
        ({"replicate": 2, "shard": 2}, ("weights",)),
    ],
    ids=str,
)
def test_every_mesh_trains_like_one(sharding, cases, tmp_path):
    wanted = trained(cases, None, tmp_path)
    for found in on_ranks(sharding["shard"] * sharding.get("replicate", 1), trained, cases, sharding, tmp_path):
        for case in cases:
            assert_all_same(found[case][0], wanted[case][0], 1e-9)
            assert found[case][1] == pytest.approx(wanted[case][1], rel=1e-6, abs=1e-12)
            assert found[case][2] == wanted[case][2]  # nothing more to save
            assert found[case][3] == pytest.approx(wanted[case][3], rel=1e-9)
            assert (found[case][3] > 0.1) == CASES[case].keep_initial


SHAPES = {
    "wide": (5, 7, torch.float64),
    "one row": (1, 4, torch.float64),
    "high": (9, 3, torch.float64),
    "single": (6, 4, torch.float32),
    "another single": (3, 8, torch.float32),
    "whole": (4, 4, torch.float64),
    "idle": (4, 5, torch.float64),
    "experts": (3, 4, torch.float64),
}
PROTECTED = {
    "wide": tr.OSFT(form="update"),
    "one row": tr.OSFT(strength="hard", ratio=0.5, form="update"),
    "high": tr.OSFT(protect="weights", ratio=0.3),
    "single": tr.OSFT(protect="both", ratio=0.5),
    "another single": tr.OSFT(protect="weights", ratio=0.7),
    "whole": tr.OSFT(form="update"),
    "idle": tr.OSFT(form="update"),
    "experts": tr.OSFT(protect="both", ratio=0.5),
}


class Odd(nn.Module):
    """Weights of many shapes and two dtypes, each with operators of random bases; the same on every rank."""

    def __init__(self, sharding):
        super().__init__()
        self.mesh = tr.mesh(**sharding)
        self.held: dict[str, OperatorBuffers] = {}
        for name, (N, M, dtype) in SHAPES.items():
            mesh = None if name == "whole" else self.mesh
            target = Matrix(
                weight=name, module="", outputs=N, inputs=M, experts=3 if name == "experts" else None,
                transposed=name == "high", block=0, role="mlp",
            )  # fmt: skip
            value = torch.zeros(target.shape, dtype=dtype)
            if mesh is not None:
                over = parameter_mesh(mesh)
                value = distribute_tensor(value, over, meta_rows(target.shape, dtype, mesh).placements)
            self.register_parameter(name, nn.Parameter(value))
            self.held[name] = OperatorBuffers(
                target, operator_shapes(PROTECTED[name], target), dtype, mesh, keep_initial=False
            )
            self.held[name].to_empty(device="cpu")

    def hold(self, seed):
        """Other operators, written where the old ones are, as loading does. Returns P_out and P_in of each."""
        torch.manual_seed(seed)
        found = {}
        for name, held in self.held.items():
            lead = (3,) if name == "experts" else ()
            made = {end: _random(side, lead) for end, side in held.shapes.items()}
            found[name] = {
                end: Operator(Q, values, held.shapes[end].rest).matrix() for end, (Q, values) in made.items()
            }
            for own, value in held.values("own", made).items():
                put(held.buffer(own.removeprefix("own.")), value)
        return found

    def pull(self, seed):
        """Gradients; one weight has none."""
        torch.manual_seed(seed)
        found = {}
        for name, weight in self.named_parameters():
            G = torch.randn(weight.shape, dtype=weight.dtype)
            if name != "idle":
                weight.grad = torch.zeros_like(weight)
                put(weight.grad, G)
                found[name] = G
        return found


def _random(side: OperatorShape, lead: tuple[int, ...]):
    Q = torch.linalg.qr(torch.randn(*lead, side.size, side.size, dtype=torch.float64))[0][..., : side.columns]
    return Q, torch.rand(*lead, side.columns, dtype=torch.float64)


def odd(sharding):
    model = Odd(sharding)
    steps = UpdateSteps(model, list(SHAPES), model.held, keep_initial=False, cached=True)
    calls: Counter[str] = Counter()
    plain = dist.all_to_all_single

    def counting(*args, **kwargs):
        calls["sent"] += 1
        plain(*args, **kwargs)

    dist.all_to_all_single = counting
    sent, operators = [], {}
    for seed, renew in enumerate((True, False, True)):
        if renew:
            operators = model.hold(seed)
        gradients = model.pull(seed)
        before = calls["sent"]
        steps.project()
        sent.append(calls["sent"] - before)
        for name, G in gradients.items():
            held = model.held[name]
            wanted = G.T if held.matrix.transposed else G
            P = operators[name]
            wanted = P["out"].to(G.dtype) @ wanted if "out" in P else wanted
            wanted = wanted @ P["in"].to(G.dtype) if "in" in P else wanted
            wanted = wanted.T if held.matrix.transposed else wanted
            tolerance = 1e-12 if G.dtype == torch.float64 else 1e-5
            assert_same(gather(model.get_parameter(name).grad), wanted, tolerance, name)
        assert model.get_parameter("idle").grad is None
    return sent


@pytest.mark.parametrize("sharding", [{"shard": 2}, {"shard": 4}, {"replicate": 2, "shard": 2}], ids=str)
def test_any_rows_of_any_weight_and_operators_are_kept_until_they_are_written_to(sharding):
    world = sharding["shard"] * sharding.get("replicate", 1)
    for first, again, renewed in on_ranks(world, odd, sharding):
        assert first == renewed > again > 0


def resumed(folder):
    mesh = tr.mesh(shard=-1)
    first, second = ([rows(2, seed=i)[dist.get_rank() :: 2] for i in seeds] for seeds in ((0, 1), (2, 3)))
    run = composed("inputs", mesh, folder)
    train(run, first, lr=0.1)
    saved = {name: gather(run.plan.live()[name]).clone() for name in {*run.plan.owned, *dict(run.trainable())}}
    train(run, second, lr=0.1)
    again = composed("inputs", mesh, folder)
    for name, value in saved.items():
        put(again.plan.live()[name], value)
    train(again, second, lr=0.1)
    assert_all_same(weights(again), weights(run), 0.0)


def test_a_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    on_ranks(2, resumed, tmp_path)


def cost(N, M, config):
    target = Matrix(
        weight="w", module="", outputs=N, inputs=M, experts=None, transposed=False, block=0, role="mlp"
    )  # fmt: skip
    return OperatorBuffers(target, operator_shapes(config, target), torch.float32, None, keep_initial=False).cost


def test_the_costliest_weights_are_assigned_first_and_ranks_are_level():
    """Llama-8B. A projection costs N M² where P is kept, and 2 N M k with k columns of Q."""
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    assert all(cost(N, M, tr.OSFT(form="update")) == N * M * M for N, M in shapes)
    assert cost(1024, 4096, tr.OSFT(strength="hard", ratio=0.25, form="update")) == 2 * 1024 * 4096 * 1024
    costs = {
        f"{layer}.{i}": cost(N, M, tr.OSFT(form="update")) for layer in range(32) for i, (N, M) in enumerate(shapes)
    }
    for ranks in (1, 2, 3, 8, 24, 64, 1024):
        load: Counter[int] = Counter()
        for name, owner in assign(costs, ranks).items():
            load[owner] += costs[name]
        assert sum(load.values()) == sum(costs.values())
        least = min(load[rank] for rank in range(ranks))
        assert max(load.values()) <= max(max(costs.values()), least + min(costs.values()) * 4)
    assert set(Counter(assign(costs, 8).values()).values()) == {28}
