"""What one would try first against forgetting: replay, self-distillation, a pull towards the start.

All train the same linears with the same optimizer, on the same batches as every other method. The text that they
replay is the text that OSFT's statistics were measured on, so that both know the same of what is to be kept.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import treering as tr
from benchmarks.quality.learners import CLIP, LINEARS, Batch, Composed, Learner, Method
from benchmarks.quality.model import drawn
from treering.plan.batches import with_targets

Rows = tuple[Tensor, Tensor | None]
SHARES, WEIGHTS, PULLS = (0.5, 1.0, 2.0), (0.3, 3.0), (10.0, 30.0, 100.0)


class Replayed(Composed):
    """In each step rows of text that is to be kept are trained beside the new batch.

    The loss is (Σ of the new batch + weight · Σ of the replayed rows) / (their tokens + weight · theirs).

    Args:
        known: Rows of token ids, and their labels (None: every token is trained).
        share: Replayed tokens in a step, relative to the new batch's, padding included.
        weight: Of a replayed token relative to a new one.
    """

    def __init__(
        self,
        model: Any,
        techniques: list[Any],
        statistics: Any,
        lr: float,
        *,
        known: Rows,
        share: float,
        weight: float,
    ):
        super().__init__(model, techniques, statistics, lr)
        self.known, self.share, self.weight = known, share, weight
        self._replay: Iterator[Batch] | None = None

    def step(self, batch: Batch) -> None:
        if self._replay is None:  # as many rows as the first batch asks for
            rows = max(1, round(self.share * batch["input_ids"].numel() / self.known[0].shape[1]))
            self._replay = iter(drawn(*self.known, rows, 0))
        kept = next(self._replay)
        count = batch["count"] + self.weight * kept["count"]
        self.run.loss(batch | {"count": count}).backward()
        (self.weight * self.kept_sum(kept) / count).backward()
        self.run.step(self.optimizer, clip=CLIP)

    def kept_sum(self, batch: Batch) -> Tensor:
        """Return the replayed rows' loss, summed over their tokens."""
        return self.run.loss(batch | {"count": 1})


class Distilled(Replayed):
    """Replay where the model is held to the base model's own distribution of each token: Σ KL(base ‖ model)."""

    def __init__(self, model: Any, techniques: list[Any], statistics: Any, lr: float, **replay: Any):
        self.base = copy.deepcopy(model).eval().requires_grad_(False)
        super().__init__(model, techniques, statistics, lr, **replay)

    def kept_sum(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = self.base(batch["input_ids"], use_cache=False).logits
        given = self.run.model(batch["input_ids"], use_cache=False).logits
        trained = with_targets(batch)["targets"] != -100
        return F.kl_div(
            given[trained].float().log_softmax(-1),
            wanted[trained].float().log_softmax(-1),
            reduction="sum",
            log_target=True,
        )


class Pulled(Composed):
    """After each step W ← W − lr · pull · (W − W₀): decoupled L2 to the start, as AdamW decays towards zero."""

    def __init__(self, model: Any, techniques: list[Any], statistics: Any, lr: float, *, pull: float):
        super().__init__(model, techniques, statistics, lr)
        self.pull = pull
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.start = [p.detach().clone() for p in self.trained]

    def step(self, batch: Batch) -> None:
        super().step(batch)
        share = min(1.0, self.optimizer.param_groups[0]["lr"] * self.pull)
        with torch.no_grad():
            for weight, start in zip(self.trained, self.start, strict=True):
                weight.lerp_(start, share)


def baselines(known: Tensor, written: Callable[[], Tensor]) -> Mapping[str, Method]:
    """Return every variant by its name, which begins with its family (`benchmarks.quality.families`).

    Args:
        known: The rows that statistics were measured on.
        written: Return as many rows that the base model wrote itself. Called when they are needed.
    """
    variants = [(share, 1.0) for share in SHARES] + [(1.0, weight) for weight in WEIGHTS]
    text = (known, None)
    found = {}
    for share, weight in variants:
        found[_name("replay", share, weight)] = _replay(Replayed, lambda: text, share, weight)
    for share, weight in variants:
        found[_name("self-distillation", share, weight)] = _replay(Distilled, lambda: text, share, weight)
    for pull in PULLS:
        found[f"L2 to the start {pull:g}"] = _pulled(pull)
    for share in SHARES:
        found[_name("self-generated replay", share)] = _replay(Replayed, lambda: (written(), None), share)
    for share, weight in variants:
        found[_name("osft + replay", share, weight)] = _replay(Replayed, lambda: text, share, weight, tr.OSFT())
    for share in (0.5, 1.0):
        name = _name("osft + self-distillation", share)
        found[name] = _replay(Distilled, lambda: text, share, protection=tr.OSFT())
    return found


def remembering() -> Mapping[str, Callable[[Rows], Method]]:
    """Return replays for a sequence of tasks, by name: functions of the rows of all that was learned before."""
    return {
        _name("replay", share, weight): partial(_remembering, share=share, weight=weight)
        for share, weight in ((1.0, 1.0), (2.0, 1.0), (1.0, 3.0))
    }


def _remembering(rows: Rows, share: float, weight: float) -> Method:
    return _replay(Replayed, lambda: rows, share, weight)


def _replay(
    kind: type[Replayed], rows: Callable[[], Rows], share: float, weight: float = 1.0, protection: Any = None
) -> Method:
    def start(model: Any, statistics: Any, lr: float) -> Learner:
        techniques = [protection or tr.Full(train=LINEARS)]
        kept = statistics if protection else None
        return kind(model, techniques, kept, lr, known=rows(), share=share, weight=weight)

    return start


def _pulled(pull: float) -> Method:
    return lambda model, statistics, lr: Pulled(model, [tr.Full(train=LINEARS)], None, lr, pull=pull)


def _name(family: str, share: float, weight: float = 1.0) -> str:
    return f"{family} {share:g}" + ("" if weight == 1 else f" weight {weight:g}")
