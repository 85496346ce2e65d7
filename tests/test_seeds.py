"""Seeds are a function of (seed, names) and of nothing else."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ranks import on_ranks
from treering.core.seeds import derive, generator


def test_a_derived_seed_never_changes_between_versions():
    assert derive(0, "lora", "model.layers.3.mlp.up_proj.weight") == 6973543884157142266


@given(st.integers(), st.lists(st.text() | st.integers(), max_size=4))
def test_it_fits_what_torch_and_numpy_take(seed, names):
    assert 0 <= derive(seed, *names) < 2**63


@pytest.mark.parametrize(
    "other", [(1, "a", "b"), (0, "b", "a"), (0, "ab"), (0, "a"), (0, "a", "b", ""), (0, "a", "b", 0)], ids=str
)
def test_anything_different_in_seed_or_names_is_another_seed(other):
    assert derive(*other) != derive(0, "a", "b")


def test_it_is_the_same_in_a_process_with_another_hash_seed():
    code = "from treering.core.seeds import derive; print(derive(7, 'x', 3))"
    environment = {"PYTHONHASHSEED": "99", "PYTHONPATH": "src"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(found.stdout) == derive(7, "x", 3)


def drawn():
    torch.manual_seed(torch.distributed.get_rank())  # the global generator differs, and must not matter
    before = torch.random.get_rng_state()
    value = torch.randn(5, generator=generator(3, "name", 1))
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator was advanced"
    return value


def test_every_rank_draws_the_same_numbers():
    first, second = on_ranks(2, drawn)
    assert torch.equal(first, second)
    assert torch.equal(first, torch.randn(5, generator=generator(3, "name", 1)))
