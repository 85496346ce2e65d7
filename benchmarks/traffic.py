"""Bytes that one optimizer step puts on the wire, counted: a model of shapes, on a process group without partners.

Every collective passes torch's dispatcher, where it is recorded with its tensor and the size of its group, and turned
into what one rank sends in a ring: f = (P − 1) / P of the whole for a gather or a reduce-scatter, twice that for a sum;
in an exchange, what is for others.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools import fake_collectives  # noqa: F401 (tells fake tensors what a collective returns)
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

# By operator: how often the whole goes round the ring, and where in the arguments the whole and the group are.
GATHER, SUM = 1, 2
NATIVE = {
    "_allgather_base_": (GATHER, 0, 2),
    "_reduce_scatter_base_": (GATHER, 1, 2),
    "allreduce_": (SUM, 0, 1),
}
FUNCTIONAL = {"all_gather_into_tensor": GATHER, "reduce_scatter_tensor": GATHER, "all_reduce": SUM}
LOCAL = ("wait_tensor", "_wrap_tensor_autograd", "barrier")  # no tensor travels


@dataclass
class Message:
    phase: str
    kind: str
    ranks: int
    bytes: float  # that each rank sends


@dataclass
class Traffic:
    messages: list[Message] = field(default_factory=list)

    def sent(self, *phases: str) -> float:
        """All phases, if none is named."""
        return sum(m.bytes for m in self.messages if not phases or m.phase in phases)


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()
        self.phase = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        space, name = func.namespace, func._schema.name.split("::")[1]
        if space == "c10d" and name not in LOCAL:
            if name == "alltoall_base_":
                self._exchanged(name, args[1], dist.ProcessGroup.unbox(args[2]), args[4])
                return result
            if name not in NATIVE:
                raise NotImplementedError(f"the collective {func} is not counted yet")
            rounds, whole, group = NATIVE[name]
            self._note(name, rounds, args[whole], dist.ProcessGroup.unbox(args[group]).size())
        elif space == "_c10d_functional" and name not in LOCAL:
            if name not in FUNCTIONAL:
                raise NotImplementedError(f"the collective {func} is not counted yet")
            whole = args[0] if name == "reduce_scatter_tensor" else result
            self._note(name, FUNCTIONAL[name], whole, _resolve_process_group(args[-1]).size())
        return result

    def _note(self, kind: str, rounds: int, whole: Tensor | Sequence[Tensor], ranks: int) -> None:
        tensors = [whole] if isinstance(whole, Tensor) else whole
        size = sum(t.numel() * t.element_size() for t in tensors)
        self.traffic.messages.append(Message(self.phase, kind, ranks, rounds * size * (ranks - 1) / ranks))

    def _exchanged(self, kind: str, outgoing: Tensor, group: Any, parts: Sequence[int]) -> None:
        size = (outgoing.numel() - parts[group.rank()]) * outgoing.element_size()
        self.traffic.messages.append(Message(self.phase, kind, group.size(), size))


def eightb(layers: int) -> Any:
    """Llama-3.1-8B in float32, with so many of its 32 layers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False, dtype="float32",
    )  # fmt: skip


@contextmanager
def pretended(ranks: int, rank: int = 0) -> Iterator[None]:
    """A process group of `ranks`, of which only one is here."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def of_a_step(
    config: Any,
    techniques: Sequence[Any],
    ranks: int,
    *,
    rank: int = 0,
    shapes_only: bool = True,
    statistics: bool = False,
) -> Traffic:
    """One micro-batch, one step, of a model with `config` under `techniques`; phases `model`, `gradients`, `step`.

    The second of two steps: what is kept from the first one (`communication: cached`) is there. A small model is
    counted faster with memory than as shapes.

    Args:
        statistics: it was measured, so that it is known which weights read the same inputs.
    """
    from transformers import AutoModelForCausalLM

    from treering.core.topology import mesh
    from treering.plan import draft

    recorder = Recorder()
    with pretended(ranks, rank):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        known = measured(model) if statistics else None
        plan = draft(model, techniques, mesh=mesh(device="cpu"), weights=False, statistics=known)
        with FakeTensorMode(allow_non_fake_inputs=True) if shapes_only else nullcontext(), recorder:
            plan.model.to_empty(device="cpu")
            for _ in range(2):
                recorder.traffic = Traffic()
                _step(plan, recorder)
    return recorder.traffic


def measured(model: Any) -> Any:
    """Return statistics without values: q, k and v read the same inputs, and so do gate and up."""
    from treering.anatomy import examine
    from treering.curvature.entry import Entry
    from treering.curvature.statistics import Ring, Statistics, sizes

    first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    entries = {}
    for weight, shape in sizes(examine(model)).items():
        module = weight.split(".")[-2]
        key = weight.replace(module, first.get(module, module))
        entries[weight] = Entry(key=key, tokens=4 * shape[-1], shape=shape, digest="")
    return Statistics(
        model_type="llama",
        entries=entries,
        rings=(Ring(name="none", tokens=1),),
        read=lambda entry: torch.empty(entry.shape, device="meta"),
    )


def _step(plan: Any, recorder: Recorder) -> None:
    recorder.phase = "model"
    _loss(plan.model).backward()
    trained = [p for p in plan.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for applied in plan.applied:
        recorder.phase = "gradients"
        if applied.gradients is not None:
            applied.gradients()
    recorder.phase = "step"
    for applied in plan.applied:
        if applied.before_step is not None:
            applied.before_step([optimizer])
    optimizer.step()
    for applied in plan.applied:
        if applied.after_step is not None:
            applied.after_step()
    optimizer.zero_grad()


def _loss(model: nn.Module) -> Tensor:
    tokens = torch.ones(1, 8, dtype=torch.long)
    return model(input_ids=tokens, use_cache=False).logits.float().mean()
