"""Ways to learn, each through its package's own interface, all on the same batches and with the same optimizer.

A learner is made of a model that it may take apart; `finished` gives back plain weights under the model's own names.
The loss of a step is the sum over its batches, each divided by its own `count`.
"""

import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import treering as tr
from treering.plan.batches import cross_entropy, with_targets

Batch = dict[str, Any]
ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.0}
CLIP = 1.0
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Learner(Protocol):
    model: Any
    optimizer: Any

    def step(self, *batches: Batch) -> None: ...
    def finished(self) -> dict[str, Tensor]: ...


Method = Callable[[Any, Any, float], Learner]  # (model, statistics, learning rate)


class Composed:
    """Treering's techniques, full fine-tuning among them."""

    def __init__(self, model: Any, techniques: list[Any], statistics: Any, lr: float, prepared: Path | None = None):
        self.run = tr.compose(model, techniques, statistics=statistics, prepared=prepared)
        self.model = self.run.model
        self.optimizer = self.run.optimizer(torch.optim.AdamW, lr=lr, **ADAMW)

    def step(self, *batches: Batch) -> None:
        for batch in batches:
            self.run.loss(batch).backward()
        self.run.step(self.optimizer, clip=CLIP)

    def finished(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.run.plain()}


class Foreign:
    """A model of another package, in the plain loop that its page shows."""

    def __init__(self, model: Any, lr: float):
        self.model = model.train()
        self.optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **ADAMW)

    def step(self, *batches: Batch) -> None:
        for batch in batches:
            (cross_entropy(self.model, with_targets(batch)) / batch["count"]).backward()
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Peft(Foreign):
    def __init__(self, model: Any, config: Any, lr: float):
        from peft import get_peft_model

        super().__init__(get_peft_model(model, config), lr)

    def finished(self) -> dict[str, Tensor]:
        plain = self.model.merge_and_unload()
        return {name: value.detach().clone() for name, value in plain.state_dict().items()}


class MiniTrainer(Foreign):
    """What is not a target is frozen, as in all others."""

    def __init__(self, model: Any, ratio: float, lr: float):
        from mini_trainer import osft_utils

        float32 = {"upcast_dtype": torch.float32, "output_dtype": torch.float32}
        kind = osft_utils.create_osft_model_class(type(model))
        held = kind(model.config, osft_config={}, initialize_osft=False, **float32)
        held.load_state_dict(model.state_dict())
        held.osft_config = osft_utils.auto_generate_target_osft_config(held, "llama", rank_ratio=1 - ratio)
        held.reinitialize_osft(decompose_existing_weights=True)
        for name, parameter in held.named_parameters():
            parameter.requires_grad_("osft_params" in name)
        super().__init__(held, lr)
        self.optimizer = osft_utils.optim_wrapper(self.optimizer, held)

    def finished(self) -> dict[str, Tensor]:
        return dict(self.model.prepare_state_dict_for_save(self.model.state_dict()))


def full(model: Any, statistics: Any, lr: float) -> Learner:
    """The linears of the blocks alone, as in every other method."""
    return Composed(model, [tr.Full(train=LINEARS)], None, lr)


def osft(*, prepared: Path | None = None, **settings: Any) -> Method:
    technique = tr.OSFT(**settings)

    def start(model: Any, statistics: Any, lr: float) -> Learner:
        return Composed(model, [technique], statistics if technique.measured else None, lr, prepared)

    return start


def lora(rank: int) -> Method:
    from peft import LoraConfig

    settings: Any = {"r": rank, "lora_alpha": 2 * rank, "target_modules": list(LINEARS), "task_type": "CAUSAL_LM"}
    return lambda model, statistics, lr: Peft(model, LoraConfig(**settings), lr)


def peft_osf(keep: float) -> Method:
    from peft import OSFConfig

    def start(model: Any, statistics: Any, lr: float) -> Learner:
        return Peft(model, OSFConfig(effective_rank=keep, target_modules=list(LINEARS), task_type="CAUSAL_LM"), lr)

    return start


def mini_trainer(ratio: float) -> Method:
    return lambda model, statistics, lr: MiniTrainer(model, ratio, lr)


def methods() -> Mapping[str, Method]:
    """mini_trainer where it can be imported: `benchmarks.peers.osft` makes an environment in which it can."""
    found: dict[str, Method] = {
        "full": full,
        "osft": osft(),
        "osft update": osft(form="update"),
        "osft hard .5": osft(strength="hard", ratio=0.5),
        "osft one-sided .5": osft(form="one_sided", ratio=0.5),
        "osft weights .5": osft(protect="weights", ratio=0.5),
        "osft both .5": osft(protect="both", ratio=0.5),
        "lora r8": lora(8),
        "peft osf .5": peft_osf(0.5),
    }
    if find_spec("mini_trainer"):
        found["mini_trainer .5"] = mini_trainer(0.5)
    return found


def decayed(learner: Learner, lr: float, done: float, *, shape: str) -> None:
    """Set the learning rate for when `done` of the training, 0 to 1, is over."""
    factor = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[shape]
    for group in learner.optimizer.param_groups:
        group["lr"] = lr * factor
