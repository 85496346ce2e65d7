"""Projections of sharded rows: on real ranks equal to one process, with the bytes that the formulas say."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.ranks import on_ranks
from tests.same import assert_same
from treering.anatomy.matrices import Matrix
from treering.core.sharded import TensorCache, local_rows
from treering.techniques.osft import OSFT, reference
from treering.techniques.osft.forward_factors.communication import Projection, project_
from treering.techniques.osft.forward_factors.factored import FactoredLinear

# (dimension, held, free): uneven over 2, 3 and 4 ranks, fewer rows than ranks, one direction, all but one
SHAPES = [(12, 9, 3), (13, 8, 4), (5, 3, 2), (3, 1, 1), (2, 1, 1), (17, 16, 1), (17, 1, 16), (9, 4, 5)]
LAYOUTS = {
    "one axis": ((-1,), (Shard(0),)),
    "replicas of shards": ((2, 2), (Replicate(), Shard(0))),
    "strided shards": ((2, 2), (Shard(0), Replicate())),
    "two axes": ((2, 2), (Shard(0), Shard(0))),
    "replicated": ((2, 2), (Replicate(), Replicate())),
}

GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # before torch 2.13


class Counted:
    """What this rank gives to collectives, in elements, and how often."""

    def __enter__(self):
        self.summed, self.gathered, self.calls = 0, 0, 0
        self.saved = dist.all_reduce, getattr(dist, GATHER)

        def all_reduce(tensor, *args, **kwargs):
            self.summed += tensor.numel()
            self.calls += 1
            return self.saved[0](tensor, *args, **kwargs)

        def all_gather(whole, own, *args, **kwargs):
            self.gathered += own.numel()
            self.calls += 1
            return self.saved[1](whole, own, *args, **kwargs)

        dist.all_reduce = all_reduce
        setattr(dist, GATHER, all_gather)
        return self

    def __exit__(self, *_):
        dist.all_reduce = self.saved[0]
        setattr(dist, GATHER, self.saved[1])


def bases(shapes=SHAPES, dtype=torch.float64):
    """(X, Q, the directions that are left, (I − Q Qᵀ) X), whole, the same on every rank."""
    torch.manual_seed(1)
    for D, held, open_ in shapes:
        Q, _ = torch.linalg.qr(torch.randn(D, D, dtype=dtype))
        X = torch.randn(D, open_, dtype=dtype)
        yield X, Q[:, :held].contiguous(), Q[:, held:].contiguous(), reference.project(X, Q[:, :held])


def mesh_of(layout):
    sizes, placements = LAYOUTS[layout]
    sizes = tuple(dist.get_world_size() if s == -1 else s for s in sizes)
    return init_device_mesh("cpu", sizes, mesh_dim_names=tuple("abc"[: len(sizes)])), placements


def sides(layout, turned, inside, kept=None):
    mesh, placements = mesh_of(layout)
    made, wanted = [], []
    for X, Q, rest, truth in bases():
        value, basis = (X, rest) if inside else (X, Q)
        value, basis = (
            distribute_tensor((t.T if turned else t).contiguous(), mesh, placements) for t in (value, basis)
        )
        made.append(Projection(value, basis, inside=inside, turned=turned, cache=kept() if kept else None))
        wanted.append(truth.T if turned else truth)
    return made, wanted


def projected(layouts):
    for layout, turned, inside in itertools.product(layouts, (False, True), (False, True)):
        made, wanted = sides(layout, turned, inside)
        project_(made)
        for i, (side, truth) in enumerate(zip(made, wanted)):
            assert_same(side.value.full_tensor(), truth, 1e-12, f"{layout}, turned {turned}, inside {inside}, {i}")
    return [layouts]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_sharded_rows_project_like_complete_ones(world):
    on_ranks(world, projected, [name for name in LAYOUTS if world == 4 or name == "one axis"])


def test_one_process_needs_no_group():
    for X, Q, rest, truth in bases():
        for turned in (False, True):
            for basis, inside in ((Q, False), (rest, True)):
                value = (X.T if turned else X).clone()
                project_([Projection(value, basis.T if turned else basis, inside=inside, turned=turned)])
                assert_same(value.T if turned else value, truth, 1e-12)


def test_experts_are_projected_one_by_one():
    X, Q = torch.randn(3, 8, 2, dtype=torch.float64), torch.linalg.qr(torch.randn(3, 8, 5, dtype=torch.float64))[0]
    wanted = reference.project(X, Q)
    project_([Projection(X, Q)])
    assert_same(X, wanted, 1e-14)


def gathers():
    """What the gathered wire takes apart from projecting: the basis itself, for many numbers of rows."""
    mesh, placements = mesh_of("one axis")
    for k in range(1, 14):
        Q = torch.randn(k, 15, dtype=torch.float64)
        kept = TensorCache()
        value, basis = (distribute_tensor(Q.clone(), mesh, placements) for _ in range(2))
        project_([Projection(value, basis, turned=True, cache=kept)])
        assert torch.equal(kept.value, Q), f"{k} rows over {dist.get_world_size()}"
        start, _ = local_rows(basis)
        assert torch.equal(basis.to_local(), Q[start : start + basis.to_local().shape[0]])
    return []


@pytest.mark.parametrize("world", [2, 3, 4])
def test_uneven_bases_are_gathered_without_their_padding(world):
    on_ranks(world, gathers)


def counts():
    ranks = dist.get_world_size()
    found = {}
    for inside in (False, True):
        made, _ = sides("one axis", False, inside)
        with Counted() as count:
            project_(made)
        wanted = sum((d - h) * o if inside else h * o for d, h, o in SHAPES)
        assert (count.summed, count.gathered, count.calls) == (wanted, 0, 1)
        made, _ = sides("one axis", True, inside)
        with Counted() as count:
            project_(made)
        wanted = sum(-(-((d - h) if inside else h) // ranks) * d for d, h, _ in SHAPES)
        assert (count.summed, count.gathered, count.calls) == (0, wanted, len(SHAPES))
    for turned in (False, True):
        made, _ = sides("one axis", turned, False) if ranks != 4 else sides("replicated", turned, False)
        with Counted() as count:
            project_(made)
        found[turned] = count.calls
    return found


def test_the_wire_carries_what_the_formulas_say_and_nothing_between_replicas():
    for found in on_ranks(4, counts):
        assert found == {False: 0, True: 0}


def batched():
    results = []
    for bucket in (1, 200, 1 << 30):
        made, _ = sides("one axis", False, False)
        with Counted() as count:
            project_(made, bucket=bucket)
        results.append(([side.value.to_local().clone() for side in made], count.calls, count.summed))
    (one_by_one, most, bytes_one), (_, some, _), (together, fewest, bytes_all) = results
    assert (most, fewest) == (len(SHAPES), 1) and most > some > fewest and bytes_one == bytes_all
    return [bool(all(torch.equal(a, b) for a, b in zip(one_by_one, together)))], max(
        float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(one_by_one, together)
    )


def test_batched_equals_one_by_one_bit_for_bit():
    assert all(equal for (equal,), _ in on_ranks(2, batched))


def test_more_ranks_sum_in_another_order_and_agree_to_rounding():
    assert all(difference < 1e-14 for _, difference in on_ranks(3, batched))


def kept():
    made, _ = sides("one axis", True, False, TensorCache)
    calls = []
    for _ in range(2):
        with Counted() as count:
            project_(made)
        calls.append(count.calls)
    for side in made:  # new values of the same parameter: what was kept of the old ones is worth nothing
        with torch.no_grad():
            side.basis.to_local().copy_(torch.zeros_like(side.basis.to_local()))
            side.value.to_local().fill_(1.0)
    with Counted() as count:
        project_(made)
    assert all(bool((side.value.to_local() == 1).all()) for side in made), "projected by a basis that is gone"
    return [*calls, count.calls]


@pytest.mark.parametrize("world", [2, 4])
def test_a_kept_basis_is_gathered_once_and_again_when_it_was_written_to(world):
    assert on_ranks(world, kept) == [[len(SHAPES), 0, len(SHAPES)]] * world


LLAMA_8B = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]


@pytest.mark.parametrize(("ratio", "gigabytes"), [(0.1, 1.33), (0.25, 3.88), (0.5, 9.63)])
def test_a_pass_over_llama_8b_on_8_ranks_sends_what_the_cost_table_says(ratio, gigabytes):
    """What the projections themselves would sum, from their shapes: no memory is taken."""
    total = 0
    for N, M in LLAMA_8B:
        module = FactoredLinear(
            OSFT(protect="weights", form="factors"),
            Matrix(weight="w", module="m", outputs=N, inputs=M, experts=None, transposed=False, block=0, role="mlp"),
            int(ratio * min(N, M)), torch.float32, None,
        )  # fmt: skip
        for end in "UV":
            side = module.projection(end, lambda p: p)
            total += 32 * 4 * side.coefficients.numel()
    assert 2 * 7 / 8 * total / 1e9 == pytest.approx(gigabytes, abs=0.01)
