"""A training step of a drafted model with fake tensors, or with real ones, under the tracker."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.optim import Optimizer

from treering.attention import Documents
from treering.core.errors import PlanError
from treering.memory import attention
from treering.memory.timeline import Timeline, TracedRow, read
from treering.memory.tracker import Tracker
from treering.plan.plan import Plan
from treering.plan.run import Run

Optimizers = Callable[[Run], Sequence[Optimizer]]


def trace(
    plan: Plan,
    row: TracedRow,
    *,
    optimizers: Optimizers,
    fake: FakeTensorMode,
    device: torch.device,
    clip: float | None = 1.0,
    micro_batches: int = 1,
) -> Timeline:
    """Return the memory of one optimizer step of `plan`, which was drafted without weights and is on meta. Each
    micro-batch is one document of the tokens of `row`, which are all trained."""
    plan = replace(plan, device=device)
    models = [plan] if plan.teacher is None else [plan, plan.teacher]
    if device.type != "cpu":
        for one in models:
            attention.install(one.model)
    tracker = Tracker(device)
    with fake, tracker:
        for one in models:
            _materialise(one, device)
        batches = [batch(row.tokens, device, packed=plan.unpackable is None) for _ in range(micro_batches)]
        return watch(Run(plan, lost={}), batches, row, optimizers=optimizers, tracker=tracker, clip=clip)


def watch(
    run: Run,
    batches: Sequence[dict[str, Any]],
    row: TracedRow | None = None,
    *,
    optimizers: Optimizers,
    tracker: Tracker,
    clip: float | None,
) -> Timeline:
    """Return the timeline of one step of `run` under `tracker`, whose mode is active; tensors may be fake or real.

    Args:
        row: Of each micro-batch, before any technique cuts it; None: one of as many tokens as the first one has.
    """
    _mark_model(run, tracker)
    chosen = list(optimizers(run))
    _prime(run, chosen, tracker)
    with _segments(run, tracker):
        try:
            _step(run, batches, chosen, clip, tracker)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise PlanError(
                f"the memory of this run cannot be planned from shapes: something it does depends on values ({error})"
            ) from error
    return read(tracker, len(run.plan.anatomy.blocks), row or TracedRow(unit=batches[0]["input_ids"].numel()))


def _step(
    run: Run, batches: Sequence[dict[str, Any]], optimizers: Sequence[Optimizer], clip: float | None, tracker: Tracker
) -> None:
    for ready in run.ready(batches):
        tracker.segment = 0
        run.loss(ready).backward()
        del ready
    tracker.mark((p.grad for _, p in run.trainable()), "gradients")
    tracker.segment = last_segment(len(run.plan.anatomy.blocks))
    run.step(list(optimizers), clip=clip)


def batch(length: int, device: torch.device, *, packed: bool) -> dict[str, Any]:
    """Return a micro-batch of one document."""
    ids = torch.zeros(1, length, dtype=torch.long, device=device)
    columns: dict[str, Any] = {"input_ids": ids, "labels": ids.clone(), "samples": [], "count": length - 1}
    if packed:
        columns["position_ids"] = torch.arange(length, device=device)[None]
        ends = torch.zeros(2, dtype=torch.int32, device=device)
        columns["documents"] = Documents(lengths=(length,), cu_seqlens=ends, longest=length)
    return columns


def _materialise(plan: Plan, device: torch.device) -> None:
    """Give every parameter fake memory on its resting device, and every buffer. Tied parameters stay one."""
    cpu = torch.device("cpu")
    resting = cpu if any(a.resting == "cpu" for a in plan.applied) else device
    parameters: dict[Tensor, nn.Parameter] = {}
    for module in plan.model.modules():
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            if old not in parameters:
                parameters[old] = nn.Parameter(
                    torch.empty_like(old.detach(), device=resting), requires_grad=old.requires_grad
                )
            module._parameters[name] = parameters[old]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)


def _mark_model(run: Run, tracker: Tracker) -> None:
    """Set the category of parameters and buffers: those that are not a plain tensor belong to a technique. A teacher's
    are parameters."""
    if run.plan.teacher is not None:
        tracker.mark([*run.plan.teacher.model.parameters(), *run.plan.teacher.model.buffers()], "parameters")
    plain = run.plan.plain
    for name, parameter in run.model.named_parameters():
        tracker.mark([parameter], "parameters" if name in plain else "technique")
    technique_names = {name for applied in run.plan.applied for part in applied.parts.values() for name in part.names}
    for name, buffer in run.model.named_buffers():
        tracker.mark([buffer], "technique" if name in technique_names else "parameters")


def _prime(run: Run, optimizers: Sequence[Optimizer], tracker: Tracker) -> None:
    """Allocate the optimizer's state by a step without a forward: it exists from the second step on."""
    named = run.trainable()
    before = [p.detach().clone() for _, p in named] if not _is_fake(named) else None
    for _, parameter in named:
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
        for state in optimizer.state.values():
            tracker.mark((x for x in state.values() if isinstance(x, Tensor)), "optimizer")
        optimizer.zero_grad(set_to_none=True)
    if before is not None:
        with torch.no_grad():
            for (_, parameter), value in zip(named, before):
                parameter.copy_(value)
    tracker.start()


def _is_fake(named: Sequence[tuple[str, Tensor]]) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    from treering.core.sharded import local

    return all(isinstance(local(p), FakeTensor) for _, p in named)


def last_segment(blocks: int) -> int:
    """Return the segment of the optimizer step: see `_segments`."""
    return 2 * blocks + 3


@contextmanager
def _segments(run: Run, tracker: Tracker) -> Iterator[None]:
    """Open a context that sets `tracker.segment` while a step of L blocks runs.

    Segments: 0 before the blocks, 1 … L their forwards, L + 1 head and loss, forward and backward, then the backwards
    of the blocks from the last, that of what is before them, and the optimizer step. Hooks on gradients show where the
    backward is; they keep no tensor alive.
    """
    blocks = [run.model.get_submodule(block.fqn) for block in run.plan.anatomy.blocks]
    total = len(blocks)

    def at(segment: int) -> Callable[..., None]:
        def arrive(*_: Any) -> None:
            tracker.segment = segment

        return arrive

    def entered(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            tracker.segment = 1 + index
            hidden = args[0] if args else kwargs.get("hidden_states")
            if index == 0 and isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(at(2 * total + 2))

        return hook

    def left(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(at(2 * total + 1 - index))
            if index == total - 1:
                tracker.segment = total + 1

        return hook

    handles = [
        handle
        for i, block in enumerate(blocks)
        for handle in (
            block.register_forward_pre_hook(entered(i), with_kwargs=True, prepend=True),
            block.register_forward_hook(left(i), prepend=True),
        )
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
