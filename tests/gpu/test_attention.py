"""Every kernel and its gradients equal a plain softmax in float64, at toy sizes, on the CPU and on a card."""

import time

import pytest

from benchmarks.gpu.attention import BARS, CAPPED, CASES, error
from benchmarks.gpu.device import Context, Device

EVERY = CASES | CAPPED


@pytest.mark.parametrize("dry", [True, pytest.param(False, marks=pytest.mark.gpu)], ids=["cpu", "cuda"])
@pytest.mark.parametrize("name", EVERY)
def test_kernel_and_its_gradients_equal_float64(name, dry):
    context = Context(device=Device(dry=dry, toy=True), until=time.monotonic() + 60)
    found, kernel = error(context, EVERY[name])
    assert found <= BARS[EVERY[name].dtype], f"{kernel}: {found:.1e}"
