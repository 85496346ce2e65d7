"""Small models as values: a config and a state, made into fresh models as often as needed."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import treering as tr
from benchmarks.quality.learners import Batch, Learner, Method, decayed
from treering.core.seeds import generator
from treering.plan.batches import cross_entropy, with_targets


@dataclass(frozen=True, kw_only=True)
class Small:
    config: Any
    state: dict[str, Tensor]

    def fresh(self) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(self.config)
        model.load_state_dict(self.state, strict=False)  # a tied head is not in it
        model.tie_weights()
        return model

    def learnt(self, learner: Learner) -> "Small":
        return replace(self, state=learner.finished())

    def towards(self, start: "Small", share: float) -> "Small":
        """Return what lies at `share` of the way from `start` to this model."""
        return replace(self, state={n: torch.lerp(w, self.state[n], share) for n, w in start.state.items()})

    def measured(self, batches: Iterable[Batch], onto: Iterable[Any] = ()) -> Any:
        return tr.measure(self.fresh(), batches, onto=list(onto))


def batch(ids_BS: Tensor, labels_BS: Tensor | None = None) -> Batch:
    labels = ids_BS.clone() if labels_BS is None else labels_BS
    count = int((labels[:, 1:] != -100).sum())
    return {"input_ids": ids_BS, "labels": labels, "count": count, "samples": ["benchmark"]}


def learn(
    small: Small, method: Method, statistics: Any, lr: float, batches: Iterable[Batch], steps: int, shape: str
) -> Small:
    learner = method(small.fresh(), statistics, lr)
    for number, one in zip(range(steps), batches):
        decayed(learner, lr, number / steps, shape=shape)
        learner.step(one)
    return small.learnt(learner)


def drawn(ids: Tensor, labels: Tensor | None, size: int, seed: int) -> Iterable[Batch]:
    """Endless batches of `size` rows, each row once before any comes again."""
    draw = generator(seed, "order")
    while True:
        for rows in torch.randperm(len(ids), generator=draw).split(size):
            yield batch(ids[rows], None if labels is None else labels[rows])


def pretrained(config: Any, batches: Iterable[Batch], steps: int, lr: float, seed: int, file: Path) -> Small:
    """Every parameter, from random ones; kept in `file`."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    if not file.exists():
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
        for number, one in zip(range(steps), batches):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (number + 1) / 30) * max(0.02, 1 - number / steps)
            (cross_entropy(model, with_targets(one)) / one["count"]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().clone() for name, p in model.named_parameters()}, file)
    return Small(config=config, state=load_file(file))


@torch.no_grad()
def exact(model: Any, ids: Tensor, labels: Tensor) -> float:
    """Share of rows of which every trained token is the likeliest one, given what is before it."""
    likely = torch.cat([model(rows, use_cache=False).logits[:, :-1].argmax(-1) for rows in ids.split(64)])
    wanted = labels[:, 1:]
    return float(((likely == wanted) | (wanted == -100)).all(1).float().mean())


@torch.no_grad()
def nats(model: Any, ids: Tensor) -> float:
    """A token, in the mean over all that are predicted."""
    total = sum(float(cross_entropy(model, with_targets(batch(rows)))) for rows in ids.split(16))
    return total / ids[:, 1:].numel()
