"""Every check of `checks.py`: on the CPU as a dry form, and on a CUDA card where there is one."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.gpu.checks import ALONE, GROUPED
from tests.ranks import on_ranks

CUDA = pytest.param("cuda:0", marks=pytest.mark.gpu)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", ALONE)
def test_check(name, device):
    ALONE[name](torch.device(device))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_checks_that_shard(device):
    on_ranks(1, in_a_group_of_its_own, device, timeout=240.0)


def in_a_group_of_its_own(device):
    """The rank's gloo group makes place for the one that `treering.mesh` makes: NCCL's on a card."""
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name)
    for name, check in GROUPED.items():
        try:
            check(torch.device(device))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
