"""Tests marked `gpu` need a CUDA card and are skipped without one."""

import os

import pytest
import torch

# Before CUDA starts: without it, cuBLAS refuses to compute where sums in one order are asked for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # the folder is called so as well
            item.add_marker(pytest.mark.skip(reason="needs a CUDA card"))
