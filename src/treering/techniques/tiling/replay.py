"""What a second run of the same code needs to compute the same numbers: random states and autocast."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


class Replay:
    """The surroundings of a forward. `again()` restores them, and leaves the random states as they were before."""

    def __init__(self, device: torch.device):
        self.device = device
        kinds = dict.fromkeys(("cpu", device.type)) if device.type != "meta" else {}
        self.autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in kinds
            if torch.amp.is_autocast_available(kind)
        ]
        self.random = self._states()

    @contextmanager
    def casting(self) -> Iterator[None]:
        """Cast as the forward did, without a cache: each tile has new aliases, whose casts would accumulate."""
        with ExitStack() as stack:
            if any(enabled for _, enabled, _ in self.autocast):
                for kind, enabled, dtype in self.autocast:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        now = self._states()
        self._set(self.random)
        try:
            with self.casting():
                yield
        finally:
            self._set(now)

    def _states(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type not in ("cpu", "meta"):
            states.append(torch.get_device_module(self.device).get_rng_state(self.device))
        return states

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.get_device_module(self.device).set_rng_state(states[1], self.device)
