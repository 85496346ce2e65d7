"""Rows, norms and sums of tensors that are cut over two axes of a mesh, on real ranks."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import treering as tr
from tests.ranks import on_ranks
from treering.core.sharded import gather, local, local_rows, put, sharded_axes, sum_over_rows
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
