"""The values that an anatomy consists of. Names are those of `model.named_parameters()`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal[
    "embedding", "position", "norm", "attention", "mlp", "experts", "router", "sink", "mixer", "head", "other"
]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter. A bias has the role of its linear; a tied head has no parameter of its own."""

    name: str
    role: Role
    shape: tuple[int, ...]
    module: str  # the module that holds it
    block: int | None


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A module whose forward is x @ Wᵀ + b (`transposed`: x @ W + b, transformers' Conv1D) and nothing else.

    Where the role is "mixer", the model may read the weight without calling the module (Mamba's dt_proj).
    """

    fqn: str
    weight: str  # of a tied head: the embedding's parameter
    bias: str | None
    inputs: int
    outputs: int
    transposed: bool
    block: int | None
    role: Role


@dataclass(frozen=True, kw_only=True)
class Attention:
    """A softmax attention.

    `interface`: it calls transformers' attention interface, so a registered function can stand in for it.
    `kind` is the config's word for the layer ("full_attention", "sliding_attention", "chunked_attention", ...).
    `kv_heads` and the dims are those of the tensors that attention is computed on (latent attention: after expansion).
    The scale of q·k is not here: some modules scale queries first, and only the call to the interface shows it.
    """

    fqn: str
    block: int
    kind: str
    interface: bool
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    sliding_window: int | None  # a token sees itself and the `sliding_window - 1` before it
    softcap: float | None
    sinks: str | None


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Experts stacked in 3-D parameters [E, out, in], or [E, in, out] when `transposed`; biases are [E, out]."""

    fqn: str
    block: int
    number: int
    stacked: tuple[str, ...]
    biases: tuple[str, ...]
    transposed: bool
    gated: bool
    fused: bool  # gate and up are one parameter: all of gate first, or, if `interleaved`, gate and up in turn
    interleaved: bool
    router: str | None


@dataclass(frozen=True, kw_only=True)
class Block:
    """One layer. `mixer` is "other" when tokens meet in anything besides one softmax attention, e.g. a convolution."""

    fqn: str
    index: int
    attention: str | None
    mlp: str | None  # None as well where the feed-forward part is not one module
    mixer: Literal["attention", "other"]
    mixer_class: str


@dataclass(frozen=True, kw_only=True)
class Head:
    """logits = softcap · tanh(z / softcap), z = scale · (h Wᵀ + b), h: the output of the module that holds the blocks.

    `unknown` names what else the model's forward does to its logits: where it is not empty, the formula above does not
    hold.
    """

    fqn: str
    weight: str
    bias: str | None
    tied_to: str | None
    scale: float
    softcap: float | None
    unknown: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A causal language model, described."""

    model_type: str
    parameters: Mapping[str, Parameter]
    linears: tuple[Linear, ...]
    blocks: tuple[Block, ...]
    attentions: tuple[Attention, ...]
    experts: tuple[Experts, ...]
    embeddings: tuple[str, ...]  # modules: the token embedding first
    norms: tuple[str, ...]  # modules, with or without weights
    final_norm: str | None
    head: Head | None

    def with_role(self, *roles: Role) -> tuple[Parameter, ...]:
        """Return the parameters that have one of `roles`, in the model's order."""
        return tuple(p for p in self.parameters.values() if p.role in roles)
