import os

import pytest

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a machine with a card may have pytest and nothing more: tests/gpu needs no hypothesis
    pass
else:
    # A shared machine is sometimes slow; that is no finding about the code.
    settings.register_profile("treering", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("treering")

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def alone():
    """One thread, and no process group that an earlier test made."""
    import torch

    torch.set_num_threads(1)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Autograd counts devices when it is first used: the stand-in that memory is planned on must be there before."""
    if any({"plan", "cli", "quantize"} & set(item.path.parts) for item in session.items):
        from treering.memory import pretend

        pretend.accelerator()
