"""Meshes from a few numbers: the arithmetic, the refusals, and the groups on real ranks."""

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import treering as tr
from tests.ranks import on_ranks
from treering.core.topology import AXES, axis_size, data_rank, expert_mesh, parameter_mesh, sizes, unit_mesh


@pytest.mark.parametrize(
    ("world", "given_sizes", "wanted"),
    [
        (1, {}, (1, 1, 1, 1)),
        (8, {}, (1, 8, 1, 1)),
        (8, {"sequence": 4}, (1, 2, 4, 1)),
        (8, {"replicate": -1, "shard": 2}, (4, 2, 1, 1)),
        (8, {"replicate": 2, "shard": 4}, (2, 4, 1, 1)),
        (8, {"replicate": 2, "sequence": 2, "expert": 2}, (2, 2, 2, 2)),
        (8, {"replicate": 2, "expert": -1}, (2, 4, 1, 4)),
    ],
)
def test_minus_one_takes_the_rest(world, given_sizes, wanted):
    assert sizes(world, **given_sizes) == wanted


@pytest.mark.parametrize(
    ("world", "given_sizes", "message"),
    [
        (8, {"sequence": 3}, r"sequence=3.*multiply to 3, which does not divide 8 ranks"),
        (8, {"shard": 4}, r"has 4 places for 8 ranks; start 4 ranks, or write -1"),
        (2, {"replicate": 2, "shard": 2}, r"has 4 places for 2 ranks"),
        (8, {"replicate": -1, "shard": -1}, r"replicate and shard are both -1"),
        (8, {"shard": 0}, r"shard=0; a size is at least 1, or -1"),
        (8, {"sequence": -2}, r"sequence=-2"),
        (1, {"sequence": 2}, r"which does not divide 1 ranks"),
        (8, {"replicate": 2, "expert": 8}, r"expert=8 does not divide the 4 ranks of shard × sequence"),
        (6, {"expert": 4}, r"expert=4 does not divide the 6 ranks"),
        (8, {"expert": 0}, r"expert=0; a size is at least 1, or -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_what_to_write(world, given_sizes, message):
    with pytest.raises(tr.PlanError, match=message):
        sizes(world, **given_sizes)


@given(st.tuples(*[st.integers(1, 5)] * 3), st.integers(0, 2))
def test_whichever_axis_is_left_open_is_found_again(shape, open_axis):
    world = shape[0] * shape[1] * shape[2]
    given_sizes = dict(zip(AXES, shape))
    assert sizes(world, **given_sizes) == (*shape, 1)
    assert sizes(world, **(given_sizes | {AXES[open_axis]: -1})) == (*shape, 1)


def test_without_a_mesh_there_is_one_of_everything():
    assert axis_size(None, "shard", "sequence") == 1
    assert data_rank(None) == (0, 1)


def looked_at(**given_sizes):
    mesh = tr.mesh(**given_sizes)
    first, again = parameter_mesh(mesh), parameter_mesh(mesh)  # two models may share one mesh
    assert first == again
    members = [dist.get_process_group_ranks(first.get_group(axis)) for axis in range(first.ndim)]
    return data_rank(mesh), tuple(first.shape), members, axis_size(mesh, "shard", "sequence")


def test_four_ranks_shard_over_one_axis():
    for rank, (data, shape, members, sharded) in enumerate(on_ranks(4, looked_at)):
        assert (data, shape, members, sharded) == ((rank, 4), (4,), [[0, 1, 2, 3]], 4)


def look(settings):
    return looked_at(**settings)


def test_ranks_along_sequence_share_their_documents_and_shard_parameters_together():
    for rank, (data, shape, members, sharded) in enumerate(on_ranks(4, look, {"sequence": 2})):
        assert (data, shape, members, sharded) == ((rank // 2, 2), (4,), [[0, 1, 2, 3]], 4)


def test_copies_shard_within_themselves():
    for rank, (data, shape, members, sharded) in enumerate(on_ranks(4, look, {"replicate": 2})):
        other = [[0, 2], [1, 3]][rank % 2]
        assert (data, shape, members, sharded) == ((rank, 4), (2, 2), [other, [[0, 1], [2, 3]][rank // 2]], 2)


def test_copies_with_sequence_shard_over_the_sequence_axis():
    for rank, (data, shape, members, sharded) in enumerate(on_ranks(4, look, {"replicate": 2, "sequence": 2})):
        other = [[0, 2], [1, 3]][rank % 2]
        assert (data, shape, members, sharded) == ((rank // 2, 2), (2, 2), [other, [[0, 1], [2, 3]][rank // 2]], 2)


def looked_at_experts(settings):
    mesh = tr.mesh(**settings)
    view = expert_mesh(mesh)
    members = [dist.get_process_group_ranks(view.get_group(axis)) for axis in ("efsdp", "expert")]
    return data_rank(mesh), tuple(unit_mesh(view).shape), axis_size(mesh, "expert"), members


def test_experts_are_a_second_view_of_ranks_that_keep_their_documents():
    for rank, (data, shape, experts, members) in enumerate(on_ranks(4, looked_at_experts, {"expert": 2})):
        assert (data, shape, experts) == ((rank, 4), (2,), 2)
        assert members == [[[0, 2], [1, 3]][rank % 2], [[0, 1], [2, 3]][rank // 2]]


def test_experts_divide_a_copy_and_ranks_of_one_document():
    settings = {"replicate": 2, "sequence": 2, "expert": 2}
    for rank, (data, shape, experts, members) in enumerate(on_ranks(4, looked_at_experts, settings)):
        assert (data, shape, experts) == ((rank // 2, 2), (2, 1), 2)
        assert members == [[rank], [[0, 1], [2, 3]][rank // 2]]


def test_a_mesh_without_experts_has_no_second_view():
    assert on_ranks(2, without_experts) == [(None, 1)] * 2


def without_experts():
    mesh = tr.mesh()
    return expert_mesh(mesh), axis_size(mesh, "expert")


def alone():
    """What a user without a launcher has: no environment, no process group."""
    import os

    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    mesh = tr.mesh()
    first = dist.group.WORLD
    tr.mesh(replicate=1, shard=1)
    assert dist.group.WORLD is first, "a second mesh made a second process group"
    found = tuple(mesh.shape), mesh.mesh_dim_names, dist.get_world_size(), data_rank(mesh)
    with pytest.raises(tr.PlanError, match="2 places for 1 ranks"):
        tr.mesh(shard=2)
    return found


def test_one_process_needs_no_launcher():
    assert on_ranks(1, alone) == [((1, 1, 1), AXES, 1, (0, 1))]


def refused():
    with pytest.raises(tr.PlanError, match="3 places for 2 ranks"):
        tr.mesh(shard=3)
    return True


def test_every_rank_refuses_a_mesh_that_does_not_fit():
    assert on_ranks(2, refused) == [True, True]
