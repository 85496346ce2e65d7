"""Rows, norms and sums of tensors that are cut over two axes of a mesh, on real ranks."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import treering as tr
from tests.ranks import on_ranks
from tests.techniques.osft.forward_factors.test_communication import Counted
from treering.core.sharded import (
    TensorCache,
    gather,
    local,
    local_rows,
    meta_rows,
    put,
    row_groups,
    sharded_axes,
    start_gather,
    sum_of_squares,
    sum_over_groups,
    sum_over_rows,
)
from treering.core.topology import parameter_mesh
from treering.plan.step import norm_over_meshes


def strided(rows: int) -> list:
    """A weight that is cut over the inner axis first, as experts are, and then by FSDP over the outer one."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    module = nn.Linear(3, rows, bias=False)
    whole = torch.arange(rows * 3, dtype=torch.float32).view(rows, 3)
    module.weight = nn.Parameter(distribute_tensor(whole, mesh["inner"], [Shard(0)]))
    fully_shard(module, mesh=mesh["outer"])
    weight = module.weight
    kinds = [type(placement).__name__ for placement in weight.placements]
    start, stop = local_rows(weight)
    same = torch.equal(local(weight), whole[start:stop])
    put(weight, whole + 1)
    total = sum_over_rows(local(weight).sum().double(), weight)
    weight.grad = weight.detach().clone()
    norm = norm_over_meshes([weight.grad])
    expected = (whole + 1).norm().double(), (whole + 1).sum().double()
    return [kinds, sharded_axes(weight), same, float(norm / expected[0]), float(total / expected[1]), (start, stop)]


@pytest.mark.parametrize("rows", [8, 12])
def test_a_strided_shard_has_the_rows_the_sum_and_the_norm_of_the_whole(rows):
    results = on_ranks(4, strided, rows)
    for kinds, axes, same, norm, total, _ in results:
        assert kinds == ["_StridedShard", "Shard"] and axes == (1, 0)
        assert same and abs(norm - 1) < 1e-6 and abs(total - 1) < 1e-6
    assert sorted(rows for *_, rows in results) == [(i * rows // 4, (i + 1) * rows // 4) for i in range(4)]


def other_dimension() -> str:
    mesh = init_device_mesh("cpu", (2,))
    value = distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)])
    assert torch.equal(gather(value), torch.ones(4, 4))
    try:
        local_rows(value)
    except tr.PlanError as error:
        return str(error)
    return ""


def test_a_tensor_that_is_cut_along_another_dimension_is_refused_by_name():
    for message in on_ranks(2, other_dimension):
        assert "only tensors whose dimension 0 is sharded" in message


def sums():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    over = (mesh.get_group("a"), mesh.get_group("b"))
    a, b, c = torch.ones(2, 3), torch.tensor(2.0), torch.ones(4)
    with Counted() as count:
        sum_over_groups([(over, a), (over, b), ((), c)])
    return float(a.sum()), float(b), float(c.sum()), count.calls


def test_small_sums_are_sent_in_one_message():
    assert on_ranks(4, sums) == [(24.0, 8.0, 4.0, 2)] * 4


LAYOUTS = {
    "two axes": (Shard(0), Shard(0)),
    "replicas of shards": (Replicate(), Shard(0)),
    "replicated": (Replicate(), Replicate()),
}


def gathered():
    """Started for all before the first is waited for; for every number of rows that padding has to deal with."""
    mesh = init_device_mesh("cpu", (2, 2))
    for name, placements in LAYOUTS.items():
        complete = [torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows)) for rows in range(1, 10)]
        values = [distribute_tensor(value, mesh, placements) for value in complete]
        for value, finish, wanted in zip(values, [start_gather(value) for value in values], complete):
            assert torch.equal(finish(), wanted), f"{name}, {wanted.shape[0]} rows"
            start, stop = local_rows(value)
            assert torch.equal(local(value), wanted[start:stop])
            assert len(row_groups(value)) == placements.count(Shard(0))
    return []


def test_rows_are_gathered_without_their_padding_over_any_axes():
    on_ranks(4, gathered)


def test_a_tensor_that_is_not_sharded_is_gathered_as_it_is():
    value = torch.randn(3, 2)
    assert start_gather(value)() is value and row_groups(value) == () and local_rows(value) == (0, 3)


def sharded_like_fsdp(rows):
    shapes = []
    for sizes in ({"shard": 4}, {"replicate": 2, "shard": 2}, {"shard": 2, "sequence": 2}):
        mesh = tr.mesh(**sizes)
        module = nn.Linear(3, rows, bias=False)
        fully_shard(module, mesh=parameter_mesh(mesh))
        empty = meta_rows((rows, 3), torch.float32, mesh)
        assert empty.placements == module.weight.placements and empty.shape == module.weight.shape
        assert empty.device_mesh == module.weight.device_mesh and empty.is_meta
        shapes.append((tuple(local(empty).shape), tuple(local(module.weight).shape)))
    return shapes


@pytest.mark.parametrize("rows", [3, 9])
def test_a_tensor_without_values_has_the_rows_that_fsdp_gives_a_parameter(rows):
    for shapes in on_ranks(4, sharded_like_fsdp, rows):
        assert all(ours == fsdps for ours, fsdps in shapes)


def test_squares_are_summed_in_float64_over_any_dtypes():
    tensors = [torch.full((1000,), 0.1), torch.full((7,), 3.0, dtype=torch.float64), torch.ones(4).bfloat16()]
    total = sum_of_squares([*tensors, torch.empty(0)])
    assert total.dtype == torch.float64 and float(total) == pytest.approx(10 + 63 + 4, rel=1e-6)
    assert float(sum_of_squares([torch.empty(0)])) == 0.0


def test_a_cached_value_is_valid_until_a_source_is_written_to_or_replaced():
    a, b = torch.zeros(3), torch.zeros(0)
    cache = TensorCache()
    assert not cache.valid(a, b)
    cache.keep("value", a, b)
    assert cache.value == "value" and cache.valid(a, b) and cache.valid(a.view(3), b.view(0))
    assert not cache.valid(a) and not cache.valid(b, a)
    assert not cache.valid(a.clone(), b) and not cache.valid(a, b.clone()), "an empty tensor has no address to compare"
    a.add_(1)
    assert not cache.valid(a, b)
