"""Composed models of real shapes with random weights, made on the device, and packed batches for them.

`treering.compose` takes weights from somewhere. Here they are drawn where they are used, because 8 billion parameters
would take minutes from the host. Draft and materialise are those of `compose`: all but the first values is the same.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Context


def build(context: Context, config: Any, techniques: Sequence[Any], *, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a `treering.Run` of `config` on the context's device; equal calls give equal weights."""
    from transformers import AutoModelForCausalLM

    from treering.plan import Run, draft
    from treering.plan.load import materialise

    device = context.device.torch_device
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plan = replace(draft(model, techniques, weights=False), device=device)
    offloaded = any(applied.resting == "cpu" for applied in plan.applied)
    materialise(plan.model, device, torch.device("cpu") if offloaded else device)
    _randomise(plan)
    plan.model.train()
    return Run(plan, lost={})


@torch.no_grad()
def _randomise(plan: Any) -> None:
    """Values of the size that trained ones have: products of zeros or of identities run faster than real ones."""
    from treering.core.sharded import local
    from treering.techniques.quantize.packed import PackedWeight

    own = {name for applied in plan.applied for part in applied.parts.values() for name in part.names}
    draws: dict[torch.device, torch.Generator] = {}
    for module in plan.model.modules():
        if isinstance(module, PackedWeight):
            _encode(module, draws)
    for name, tensor in [*plan.model.named_parameters(), *plan.model.named_buffers()]:
        if not isinstance(tensor, torch.nn.Parameter) and name not in own:
            continue  # rotary frequencies have their values
        value = local(tensor)
        if value.dtype == torch.uint8:
            continue  # packed, and encoded above
        draw = _generator(value.device, draws)
        leaf = name.rpartition(".")[2]
        if leaf.startswith(("P_", "Q_")):
            value.normal_(0, value.shape[-1] ** -0.5, generator=draw)
        elif tensor.ndim >= 2:
            value.normal_(0, 0.02, generator=draw)
        else:
            value.fill_(1.0)


def _encode(packed: Any, draws: dict[torch.device, torch.Generator]) -> None:
    """Codes of weights such as plain matrices get."""
    device = next(packed.parameters()).device
    weight = torch.empty(packed.shape, dtype=torch.bfloat16, device=device)
    weight.normal_(0, 0.02, generator=_generator(device, draws))
    for key, value in packed.form.encode(weight).items():
        getattr(packed, key).copy_(value)


def _generator(device: torch.device, draws: dict[torch.device, torch.Generator]) -> torch.Generator:
    return draws.setdefault(device, torch.Generator(device).manual_seed(0))


def batch(context: Context, tokens: int, document: int | None = None, trained: int | None = None) -> dict[str, Any]:
    """A packed micro-batch of `tokens`, in documents of equal length; only its last `trained` tokens are, if given."""
    from treering.attention import Documents

    device, vocabulary = context.device.torch_device, context.sizes.vocabularies["llama"]
    document = min(document or tokens, tokens)
    whole, rest = divmod(tokens, document)
    lengths = [document] * whole + [rest] * bool(rest)
    draw = torch.Generator(device).manual_seed(tokens)
    ids = torch.randint(vocabulary, (1, tokens), generator=draw, device=device)
    labels = ids.clone()
    labels[:, : tokens - (trained or tokens)] = -100
    labels[:, [sum(lengths[:i]) for i in range(len(lengths))]] = -100
    positions = torch.arange(tokens, device=device) % document
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions[None],
        "documents": Documents.of(lengths, device),
        "count": int((labels != -100).sum()),
        "samples": ["0"],
    }


def forward_backward(run: Any, data: dict[str, Any]) -> None:
    """Gradients of one micro-batch, which are then dropped."""
    for ready in run.ready([data]):
        run.loss(ready).backward()
    for _, parameter in run.trainable():
        parameter.grad = None


def stepper(run: Any, optimizer: Any, data: dict[str, Any]) -> Any:
    """Return a function that takes a whole training step, clipping included."""

    def step() -> None:
        for ready in run.ready([data]):
            run.loss(ready).backward()
        if run.step(optimizer, clip=1.0).skipped:
            raise RuntimeError("a gradient was not finite, and the step was skipped: what was timed is not a step")

    return step


def gradients(run: Any, data: dict[str, Any]) -> dict[str, Tensor]:
    """Return the gradients of one micro-batch by name, and clear them."""
    for ready in run.ready([data]):
        run.loss(ready).backward()
    found = {}
    for name, parameter in run.trainable():
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found


def adamw(run: Any) -> Any:
    return run.optimizer(torch.optim.AdamW, lr=1e-5, fused=True)
