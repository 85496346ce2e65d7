"""Independent references for the parts an anatomy names, put in place of an instance's forward.

Each function replaces every part of one kind and returns the names that the following forwards really used.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from treering.anatomy import Anatomy, Attention, Experts

Replacement = Callable[[nn.Module, Anatomy], set[str]]


def linears(model: nn.Module, anatomy: Anatomy) -> set[str]:
    """Sums of products, written out."""
    used: set[str] = set()
    for linear in anatomy.linears:
        weight = model.get_parameter(linear.weight)
        bias = None if linear.bias is None else model.get_parameter(linear.bias)
        shape = (linear.inputs, linear.outputs) if linear.transposed else (linear.outputs, linear.inputs)
        assert tuple(weight.shape) == shape

        def forward(x: Tensor, linear=linear, weight=weight, bias=bias) -> Tensor:
            used.add(linear.fqn)
            y = torch.einsum("...i,io->...o" if linear.transposed else "...i,oi->...o", x, weight)
            return y if bias is None else y + bias

        model.get_submodule(linear.fqn).forward = forward
    return used


def norms(model: nn.Module, anatomy: Anatomy) -> set[str]:
    """Layer norm and RMS norm from their formulas; Gemma's weight is stored less one."""
    used: set[str] = set()
    for fqn in anatomy.norms:
        norm: Any = model.get_submodule(fqn)

        def forward(x: Tensor, norm=norm, fqn=fqn) -> Tensor:
            used.add(fqn)
            eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
            z, weight = x.double(), norm.weight.double()
            if isinstance(norm, nn.LayerNorm):
                z = z - z.mean(-1, keepdim=True)
            z = z / (z.square().mean(-1, keepdim=True) + eps).sqrt()
            z = z * (1 + weight if type(norm).__name__.startswith("Gemma") else weight)
            return (z if getattr(norm, "bias", None) is None else z + norm.bias.double()).to(x.dtype)

        norm.forward = forward
    return used


def experts(model: nn.Module, anatomy: Anatomy) -> set[str]:
    """A loop over tokens and their experts."""
    used: set[str] = set()
    for part in anatomy.experts:

        def forward(x_TD: Tensor, choice_TK: Tensor, weight_TK: Tensor, part=part) -> Tensor:
            used.add(part.fqn)
            rows = []
            for x_D, choice_K, weight_K in zip(x_TD, choice_TK.tolist(), weight_TK, strict=True):
                chosen = zip(choice_K, weight_K, strict=True)
                rows.append(sum(weight * _one_expert(model, part, e, x_D) for e, weight in chosen))
            return torch.stack(rows)

        model.get_submodule(part.fqn).forward = forward
    return used


def _one_expert(model: nn.Module, part: Experts, e: int, x_D: Tensor) -> Tensor:
    assert part.gated and part.fused
    first, second = (model.get_parameter(name)[e] for name in part.stacked)
    module: Any = model.get_submodule(part.fqn)
    z = x_D @ first if part.transposed else first @ x_D
    if part.biases:
        z = z + model.get_parameter(part.biases[0])[e]
    gate, up = (z[0::2], z[1::2]) if part.interleaved else z.chunk(2)
    if hasattr(module, "limit"):  # gpt_oss: both sides clamped, a sharper sigmoid, up moved by one
        gate, up = gate.clamp(max=module.limit), up.clamp(-module.limit, module.limit)
        z = (up + 1) * gate * torch.sigmoid(module.alpha * gate)
    else:
        z = module.act_fn(gate) * up
    z = z @ second if part.transposed else second @ z
    return z + model.get_parameter(part.biases[1])[e] if part.biases else z


def attentions(model: nn.Module, anatomy: Anatomy) -> set[str]:
    """fp64 attention with masks, softcap and sinks from the anatomy alone: what the model passes is ignored."""
    used: set[str] = set()
    known = {id(model.get_submodule(part.fqn)): part for part in anatomy.attentions if part.interface}

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **how: Any
    ) -> tuple[Tensor, None]:
        part = known[id(module)]
        used.add(part.fqn)
        sinks = None if part.sinks is None else model.get_parameter(part.sinks)
        return _attend(part, query.double() * how["scaling"], key.double(), value.double(), sinks).to(query.dtype), None

    name = "anatomy_reference"
    ALL_ATTENTION_FUNCTIONS[name] = attend  # this instance's own mapping; `forget_attention` takes it away again
    model.config._attn_implementation = name
    return used


def forget_attention() -> None:
    if "anatomy_reference" in ALL_ATTENTION_FUNCTIONS:
        del ALL_ATTENTION_FUNCTIONS["anatomy_reference"]


def _attend(part: Attention, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
    """Batch, heads, sequence, width in; batch, sequence, heads, width out."""
    length = query.shape[2]
    assert query.shape[1::2] == (part.heads, part.head_dim)
    assert key.shape[1::2] == (part.kv_heads, part.head_dim)
    assert value.shape[1::2] == (part.kv_heads, part.value_dim)
    key, value = (t.repeat_interleave(part.heads // part.kv_heads, dim=1) for t in (key, value))
    scores = query @ key.mT
    if part.softcap is not None:
        scores = part.softcap * torch.tanh(scores / part.softcap)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (part.sliding_window or length))
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(len(scores), -1, length, 1)
        scores = torch.cat([scores, column], dim=-1)
    return (scores.softmax(-1)[..., :length] @ value).transpose(1, 2).contiguous()


def embeddings(model: nn.Module, anatomy: Anatomy) -> set[str]:
    """Rows picked by a one-hot product. Gemma multiplies by a factor that its module holds."""
    used: set[str] = set()
    for fqn in anatomy.embeddings:
        module: Any = model.get_submodule(fqn)

        def forward(ids: Tensor, module=module, fqn=fqn) -> Tensor:
            used.add(fqn)
            picked = nn.functional.one_hot(ids, module.num_embeddings).to(module.weight.dtype)
            return picked @ module.weight * getattr(module, "embed_scale", 1.0)

        module.forward = forward
    return used


def logits_by_formula(model: Any, anatomy: Anatomy, ids: Tensor) -> Tensor:
    """The logits by the head's formula, from what the final norm gives."""
    normed: list[Tensor] = []
    head = anatomy.head
    assert head is not None and not head.unknown
    if anatomy.final_norm is not None:
        model.get_submodule(anatomy.final_norm).register_forward_hook(lambda _, args, out: normed.append(out))
    decoder = model.get_submodule(anatomy.blocks[0].fqn.rsplit(".", 2)[0])
    hidden = decoder(ids, use_cache=False).last_hidden_state
    if normed:
        assert torch.equal(normed[-1], hidden)
    z = hidden.double() @ model.get_parameter(head.weight).double().T
    if head.bias is not None:
        z = z + model.get_parameter(head.bias).double()
    z = z * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
