"""A stand-in for an accelerator and a process group of ranks that do not exist: shapes need neither.

Fake tensors can be on any device, but the backward of tensors on `cuda` asks the driver, which a machine without one
does not have; and on `cpu` tensors of the device could not be distinguished from those in host memory. torch has
a place for one external backend (PrivateUse1): the stand-in uses it, with streams that do nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from treering.core.errors import PlanError

NAME = "pretend"
# One kernel on every accelerator; torch falls back on several operators, and their memory, where a backend has none.
KERNELS = ("silu_backward", "mish_backward", "native_channel_shuffle")


class _Stream:
    def __init__(self, *args: Any, **settings: Any): ...

    def wait_stream(self, other: "_Stream") -> None: ...

    def wait_event(self, event: "_Event") -> None: ...

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return _Event()


class _Event(torch.Event):
    """An event that is never recorded, so that waiting for it returns at once. Streams accept only events of torch."""

    def __new__(cls, *args: Any, **settings: Any) -> "_Event":
        return super().__new__(cls, device=torch.device(NAME, 0))

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


class _DeviceModule:
    """The result of `torch.get_device_module` for the stand-in: one device, one stream, no random numbers."""

    Stream, Event = _Stream, _Event

    def __init__(self) -> None:
        self.single_stream = _Stream()

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def set_device(self, device: Any) -> None: ...

    def current_stream(self, device: Any = None) -> _Stream:
        return self.single_stream

    @contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        yield

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@cache
def accelerator() -> torch.device:
    """Return the stand-in, after registering it with torch once per process."""
    from torch.utils import backend_registration as registration

    taken = torch._C._get_privateuse1_backend_name()
    if taken != "privateuseone":
        raise PlanError(
            f"memory is planned on a stand-in for an accelerator, and torch's only place for one is taken by {taken}; "
            "plan on a machine without it"
        )
    registration._setup_privateuseone_for_python_backend(NAME, backend_module=_DeviceModule())
    _kernels()
    _refuse_late()
    return torch.device(NAME, 0)


def _refuse_late() -> None:
    """Raise PlanError where autograd has been used before: it counts devices at its first use only."""
    with FakeTensorMode():
        one = torch.ones((), device=torch.device(NAME, 0), requires_grad=True)
        try:
            (one * 2).backward()
        except RuntimeError as error:
            raise PlanError(
                "memory is planned on a stand-in for an accelerator, which a process that has computed gradients "
                "cannot get any more; plan in a fresh process: treering plan FILE"
            ) from error


@cache
def _kernels() -> torch.library.Library:
    """Register kernels for the stand-in. The library must stay alive, or torch removes them."""
    library = torch.library.Library("aten", "IMPL")
    for name in KERNELS:
        library.impl(name, _never, "PrivateUse1")
    return library


def _never(*args: Any) -> None:
    raise AssertionError("a fake tensor's operators are never run")


@cache
def _messages() -> None:
    """Register torch's fake process group for the stand-in, too."""
    import torch.distributed as dist
    from torch.testing._internal.distributed import fake_pg

    dist.Backend.register_backend(NAME, fake_pg._create_fake_pg, extended_api=True, devices=["cpu", NAME])


@contextmanager
def ranks(world: int) -> Iterator[None]:
    """Open a process group of `world` ranks that sends nothing; this process is rank 0."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    accelerator()
    _messages()
    launched = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    dist.init_process_group(NAME, store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        os.environ.update(launched)


class FakeDevice(TorchDispatchMode):
    """A mode in which every tensor that is created on the stand-in is a fake tensor; a model is drafted in it."""

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == NAME:
            with self.fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)
