"""Work is assigned to ranks by cost, and rows of matrices reach the rank that owns each, and come back."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from tests.ranks import on_ranks
from treering.core.owners import MatrixRows, RowExchange, assign


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1e6), max_size=30), st.integers(1, 9))
def test_no_rank_has_more_than_the_mean_and_one_piece_of_work(costs, ranks):
    owners = assign(costs, ranks)
    load = [sum(costs[name] for name, owner in owners.items() if owner == rank) for rank in range(ranks)]
    assert set(owners) == set(costs) and all(0 <= owner < ranks for owner in owners.values())
    assert max(load) <= sum(costs.values()) / ranks + max(costs.values(), default=0.0) + 1e-6
    assert [costs[name] for name in owners] == sorted(costs.values(), reverse=True)


def test_the_assignment_does_not_depend_on_the_order_of_names():
    costs = {"a": 2, "b": 2, "c": 2, "d": 1}
    assert assign(costs, 2) == assign(dict(reversed(costs.items())), 2) == {"a": 0, "b": 1, "c": 0, "d": 1}


@given(
    st.dictionaries(st.text(max_size=2), st.sampled_from([0.0, 1.0, 1.5, 7.0]), max_size=20),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_a_name_is_assigned_to_the_least_loaded_rank_that_may_own_it(costs, ranks, random):
    allowed = {name: random.sample(range(ranks), random.randint(1, ranks)) for name in costs}
    owners = assign(costs, ranks, may_own=lambda name, rank: rank in allowed[name])
    load = [0.0] * ranks
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        assert owners[name] == min(allowed[name], key=lambda rank: (load[rank], rank))
        load[owners[name]] += costs[name]


@given(st.dictionaries(st.integers(0, 99), st.floats(0, 10), max_size=30), st.integers(1, 6))
def test_no_rank_is_given_more_names_than_it_may_have(costs, ranks):
    most = -(-len(costs) // ranks)
    owners = list(assign(costs, ranks, most=most).values())
    assert len(owners) == len(costs) and all(owners.count(rank) <= most for rank in range(ranks))


def test_with_fewer_places_than_names_there_is_an_error():
    with pytest.raises(ValueError):
        assign({"a": 1.0, "b": 1.0, "c": 1.0}, 2, most=1)


def exchanged(sizes):
    """`sizes`: rows of the matrix that each rank owns, 0 for none."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    complete = {owner: torch.arange(rows * 3.0).view(rows, 3) + 100 * owner for owner, rows in enumerate(sizes) if rows}
    parts = {}
    for owner, matrix in complete.items():
        each = -(-len(matrix) // ranks)
        parts[owner] = MatrixRows(matrix[rank * each : (rank + 1) * each].clone(), len(matrix))
    exchange = RowExchange(dist.group.WORLD, parts)
    matrix = exchange.collect()
    assert (matrix is None) == (rank not in complete) and (matrix is None or torch.equal(matrix, complete[rank]))
    exchange.deliver(None if matrix is None else -matrix)
    for owner, part in parts.items():
        each = -(-len(complete[owner]) // ranks)
        assert torch.equal(part.rows, -complete[owner][rank * each : (rank + 1) * each])
    return []


@pytest.mark.parametrize("sizes", [(4, 7, 1), (0, 2, 5)])
def test_rows_reach_their_owner_and_come_back_changed(sizes):
    on_ranks(3, exchanged, sizes)
