"""The queue of copies: the order on a stream, and what the pretended one notices."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treering.core.errors import PlanError
from treering.techniques.recompute.copies import LEAST, HostPool, SimulatedCopies, StreamCopies, copies_for


class Device:
    """A device module that writes down what is asked of it."""

    def __init__(self):
        self.said, self.now = [], None
        device = self

        class Stream:
            def __init__(self, name="side", **_):
                self.name = name

            def wait_stream(self, other):
                device.said.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event):
                device.said.append(f"{self.name} waits for {event}")

            def record_event(self):
                device.said.append(f"event on {self.name}")
                return "the event"

        self.Stream = Stream
        self.compute = self.now = Stream("compute")

    def current_stream(self, device):
        return self.now

    @contextmanager
    def stream(self, stream):
        self.said.append(f"on {stream.name}:")
        yield
        self.said.append("done")


class Target:
    def __init__(self, device):
        self.device = device

    def copy_(self, source, non_blocking):
        assert non_blocking
        self.device.said.append(f"copy {source}")


ORDER = ["side waits for compute", "on side:", "copy a", "copy b", "done", "event on side"]


def test_a_copy_waits_for_what_was_computed_and_what_is_computed_later_for_the_copy():
    device = Device()
    ticket = StreamCopies(device, torch.device("cuda", 0)).copy([(Target(device), "a"), (Target(device), "b")])
    assert device.said == ORDER
    ticket.wait()
    assert device.said[len(ORDER) :] == ["compute waits for the event"]


def test_waiting_from_another_stream_lets_the_owner_of_the_memory_wait_as_well():
    device = Device()
    ticket = StreamCopies(device, torch.device("cuda", 0)).copy([])
    device.now = device.Stream("another")
    ticket.wait()
    assert device.said[-2:] == ["another waits for the event", "compute waits for the event"]


def test_the_stream_of_computations_is_looked_up_at_each_copy():
    device = Device()
    copies = StreamCopies(device, torch.device("cuda", 0))
    device.now = device.Stream("another")
    copies.copy([])
    assert device.said[0] == "side waits for another"


def test_the_pretended_queue_copies_late_and_in_order():
    copies = SimulatedCopies()
    source, middle, end = torch.ones(3), torch.zeros(3), torch.zeros(3)
    copies.copy([(middle, source)])
    ticket = copies.copy([(end, middle)])
    assert not middle.any() and not end.any()
    ticket.wait()
    assert middle.all() and end.all() and not copies.waiting


def test_other_devices_are_refused():
    assert isinstance(copies_for(torch.device("cpu")), SimulatedCopies)
    with pytest.raises(PlanError, match="the model is on mps; set offload to none"):
        copies_for(torch.device("mps"))


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=20), st.randoms())
def test_pieces_hold_what_is_asked_and_are_used_again(sizes, random):
    pool = HostPool(False, slab=1 << 14)
    taken = []
    for size in sizes:
        pieces = pool.take(size)
        together = sum(map(len, pieces))
        assert together >= size and together - size <= max(size, LEAST)
        taken.append(pieces)
    addresses = [piece.data_ptr() for pieces in taken for piece in pieces]
    assert len(set(addresses)) == len(addresses) and pool.used == pool.allocated
    random.shuffle(taken)
    for pieces in taken:
        pool.give(pieces)
    held = pool.allocated
    assert pool.used == 0
    again = [pool.take(size) for size in sizes]
    assert pool.allocated == held, "nothing new is needed for the same sizes"
    for pieces in again:
        pool.give(pieces)
    pool.clear()
    assert pool.allocated == 0


def test_memory_that_cannot_be_had_says_what_to_write_instead(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nmore")

    pool = HostPool(True)
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(PlanError, match=r"no more is left \(CUDA error: out of memory\). Set recompute.budget"):
        pool.take(10)


def test_many_pieces_are_few_allocations_whose_sizes_are_powers_of_two(monkeypatch):
    sizes, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **how: sizes.append(size) or empty(size // 2**15, **how))
    monkeypatch.setattr(torch.Tensor, "split", lambda x, size: [x] * (sizes[-1] // size))
    pool = HostPool(False)
    pool.reserve(8 * 2**30, 31)  # an 8B model's block input at a million tokens
    assert len(sizes) == 31 * 8 and set(sizes) == {2**30} and pool.allocated == 31 * 8 * 2**30
    pool.reserve(8 * 2**30, 31)
    assert len(sizes) == 31 * 8, "they wait"
    pool.reserve(5 * 2**25 + 1, 7)
    assert len(sizes) == 31 * 8 + 3 and all(size.bit_count() == 1 for size in sizes), "ends: 4 + 2 + 1 pieces"


def test_what_is_reserved_stays_within_a_limit():
    pool = HostPool(False, slab=1 << 14)
    pool.limit = 10 * (1 << 14)
    pool.reserve(3 << 14, 100)
    assert pool.allocated == 9 * (1 << 14)
    taken = [pool.take(3 << 14) for _ in range(2)]
    pool.reserve((1 << 14) + 5000, 100)
    assert pool.allocated <= pool.limit and pool.used == 6 * (1 << 14)
    for pieces in taken:
        pool.give(pieces)
