"""Tests marked `gpu` need a CUDA card and are skipped without one."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # the folder is called so as well
            item.add_marker(pytest.mark.skip(reason="needs a CUDA card"))
