import pytest
import torch

from treering.attention.kernels import Features, choose

bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64

# fmt: off
CASES = [
    ("cpu",  {"dtype": fp32, "width": 64},                                  "sdpa"),
    ("cpu",  {"dtype": bf16, "width": 512},                                 "sdpa"),
    ("cpu",  {"dtype": fp32, "width": 64, "window": True},                  "chunks"),
    ("cpu",  {"dtype": fp32, "width": 64, "sinks": True},                   "chunks"),
    ("cpu",  {"dtype": fp32, "width": 64, "softcap": True},                 "chunks"),
    ("meta", {"dtype": bf16, "width": 64},                                  "sdpa"),
    ("cuda", {"dtype": bf16, "width": 128},                                 "varlen"),
    ("cuda", {"dtype": bf16, "width": 128, "window": True, "sinks": True},  "varlen"),
    ("cuda", {"dtype": bf16, "width": 128, "flash": False},                 "sdpa"),
    ("cuda", {"dtype": bf16, "width": 128, "flash": False, "sinks": True},  "chunks"),
    ("cuda", {"dtype": bf16, "width": 512},                                 "sdpa"),
    ("cuda", {"dtype": bf16, "width": 512, "window": True},                 "chunks"),
    ("cuda", {"dtype": fp32, "width": 128},                                 "sdpa"),
    ("cuda", {"dtype": fp32, "width": 128, "window": True},                 "chunks"),
    ("cuda", {"dtype": bf16, "width": 256, "softcap": True},                "flex"),
    ("cuda", {"dtype": fp32, "width": 256, "softcap": True, "window": True}, "flex"),
    ("cuda", {"dtype": fp64, "width": 256, "softcap": True},                "chunks"),
    ("cuda", {"dtype": bf16, "width": 8, "softcap": True},                  "chunks"),
    ("cuda", {"dtype": bf16, "width": 256, "softcap": True, "sinks": True}, "chunks"),
]
# fmt: on


@pytest.mark.parametrize(("device", "features", "kernel"), CASES)
def test_the_kernel_is_a_function_of_device_and_features(device, features, kernel):
    assert choose(device, Features(**features)) == kernel
