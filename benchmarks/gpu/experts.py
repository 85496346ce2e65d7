"""One mixture layer of Qwen3-30B-A3B: our grouped forward next to transformers' `grouped_mm`, and what adapters add."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.device import Context
from benchmarks.gpu.record import Figure

RANK = 16


class Adapter(nn.Module):
    """Factors of rank `RANK` for each expert of one stack."""

    def __init__(self, stack: Tensor):
        super().__init__()
        experts, outputs, inputs = stack.shape
        self.A = nn.Parameter(torch.randn(experts, RANK, inputs, device=stack.device, dtype=stack.dtype))
        self.B = nn.Parameter(torch.randn(experts, outputs, RANK, device=stack.device, dtype=stack.dtype))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        from treering.experts.products import low_rank

        return low_rank(x, self.A, self.B, offsets, 1.0)


def rows(context: Context) -> Iterator[Figure]:
    from treering.core.module_forward import installed
    from treering.experts.grouped_forward import Addition, grouped

    sizes, device = context.sizes, context.device.torch_device
    theirs = _layer(context)
    plain, frozen, adapted = (copy.deepcopy(theirs) for _ in range(3))
    grouped(plain, "plain")
    grouped(frozen.requires_grad_(False), "frozen")
    with_adapters = grouped(adapted.requires_grad_(False), "adapted")
    for leaf in with_adapters.stacks:
        with_adapters.addends[leaf].append(Addition(Adapter(getattr(adapted, leaf))))
    draw = torch.Generator(device).manual_seed(0)
    shape = (sizes.experts_tokens, sizes.experts_hidden)
    hidden = torch.randn(shape, generator=draw, device=device, dtype=torch.bfloat16)
    choice = torch.rand(len(hidden), sizes.experts, generator=draw, device=device).topk(sizes.experts_chosen)
    index, weights = choice.indices, choice.values.to(hidden.dtype)
    incoming = torch.randn(shape, generator=draw, device=device, dtype=torch.bfloat16)

    def side(module: Any) -> Callable[[], None]:
        forward = installed(module)
        additions = [one for many in getattr(forward, "addends", {}).values() for one in many]
        trained = [p for m in (module, *(a.addend for a in additions)) for p in m.parameters() if p.requires_grad]

        def run() -> None:
            x = hidden.detach().requires_grad_()
            torch.autograd.grad(module(x, index, weights), [x, *trained], incoming)

        return run

    sides = {"theirs": theirs, "plain": plain, "frozen": frozen, "adapted": adapted}
    found = context.alternate({name: side(module) for name, module in sides.items()}, keep=2)
    case = (
        f"{sizes.experts} experts of {sizes.experts_hidden} × {sizes.experts_inner}, {sizes.experts_chosen} chosen, "
        f"{sizes.experts_tokens} tokens, bfloat16, forward and backward"
    )
    for figure, ours, peer, bar in (
        ("mixture layer, every weight trained / transformers' grouped_mm", "plain", "theirs", 1.05),
        (f"mixture layer, adapters of rank {RANK} / frozen without adapters", "adapted", "frozen", None),
        (f"mixture layer, adapters of rank {RANK} / every weight trained", "adapted", "plain", 1.0),
    ):
        pair = found[ours], found[peer]
        yield Figure(
            figure=f"{figure}, time", case=case, ours=pair[0].seconds, peer=pair[1].seconds, unit="s", at_most=bar
        )
        yield Figure(
            figure=f"{figure}, peak above the start", case=case, ours=pair[0].gib, peer=pair[1].gib, unit="GiB"
        )
    with torch.no_grad():
        a, b = plain(hidden, index, weights), theirs(hidden, index, weights)
    yield Figure(
        figure="outputs that differ from transformers' grouped_mm", case=case, ours=int((a != b).sum()), at_most=0
    )


def _layer(context: Context) -> Any:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    sizes = context.sizes
    config = Qwen3MoeConfig(
        hidden_size=sizes.experts_hidden, moe_intermediate_size=sizes.experts_inner, num_experts=sizes.experts,
        num_experts_per_tok=sizes.experts_chosen,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with context.device.torch_device:
        layer = Qwen3MoeExperts(config).bfloat16()
    draw = torch.Generator(context.device.torch_device).manual_seed(1)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.02, generator=draw)
    return layer
