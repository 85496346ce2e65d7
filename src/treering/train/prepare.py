"""The tokenizer of a run, and its data in the order of training."""

from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from treering.core.errors import PlanError
from treering.core.topology import data_rank
from treering.data.config import Format
from treering.data.encode import ALPACA
from treering.data.examples import Examples, build
from treering.data.loader import Loader
from treering.data.order import Order
from treering.plan import Plan
from treering.plan.open_model import locate
from treering.store import untrusted as trust
from treering.train.config import Job

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data of a run, on this rank."""

    train: Loader
    eval: Loader | None
    examples: Examples
    steps: int  # of the run, from its first start
    tokens_per_step: int
    packing: Literal["on", "off"]
    rank: int  # among the ranks that have different documents
    held_out: Examples | None = None  # what `eval` reads
    template: str | None = None  # the chat template; None: plain text
    notes: tuple[str, ...] = ()  # what a person should know before it starts

    @property
    def fill(self) -> float:
        """The share of the first epoch's bins that holds tokens."""
        return self.train.order.fill(0)


def open_tokenizer(job: Job) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of the job's model folder."""
    return trust.open_tokenizer(locate(job.model.path))


def open_data(job: Job, tokenizer: "PreTrainedTokenizerBase", plan: Plan) -> RunData:
    """Return the documents of the job, tokenised, in the order of training. The first rank to call it tokenises."""
    packing: Literal["on", "off"] = "off" if plan.unpackable or job.data.packing == "off" else "on"
    if plan.unpackable and job.data.packing == "on":
        raise PlanError(f"data.packing is on, but {plan.unpackable}; set it to off or auto", settings=("data.packing",))
    rank, ranks = data_rank(plan.mesh)
    capacity = job.data.max_length
    budget = job.train.tokens_per_step or capacity * ranks
    examples = build(job.data, tokenizer, "train")
    order = Order(
        examples.lengths,
        seed=job.seed,
        tokens_per_step=budget,
        capacity=capacity,
        shuffle=job.data.shuffle,
        packing=packing,
    )
    held_out, held_out_loader = None, None
    if job.data.evaluates:
        held_out = build(job.data, tokenizer, "eval")
        plain = Order(
            held_out.lengths,
            seed=0,
            tokens_per_step=capacity * ranks,
            capacity=capacity,
            shuffle=False,
            packing=packing,
        )
        held_out_loader = Loader(held_out, plain, rank=rank, ranks=ranks, packing=packing)
    return RunData(
        train=Loader(examples, order, rank=rank, ranks=ranks, packing=packing),
        eval=held_out_loader,
        examples=examples,
        held_out=held_out,
        template=_template(job, tokenizer, examples.report.format),
        notes=(
            *(trust.notes_on(plan.folder) if plan.folder else ()),
            *_counted("train", examples),
            *_counted("eval", held_out),
            *_ragged(budget, capacity, order, ranks),
        ),
        steps=job.train.steps or _steps(order, job.train.epochs),
        tokens_per_step=budget,
        packing=packing,
        rank=rank,
    )


def _template(job: Job, tokenizer: "PreTrainedTokenizerBase", format: Format) -> str | None:
    if format in ("prompt", "text"):
        return None
    if job.data.template is not None:
        return Path(job.data.template).expanduser().read_text("utf-8")
    return tokenizer.get_chat_template() if tokenizer.chat_template else ALPACA


def _counted(which: str, examples: Examples | None) -> list[str]:
    """Return notes on records that are skipped or changed."""
    if examples is None:
        return []
    counts = {**examples.report.notes, **examples.report.skipped}
    return [f"{which} data: {number} {kind}" for kind, number in counts.items()]


def _ragged(budget: int, capacity: int, order: Order, ranks: int) -> list[str]:
    """Return notes where a step has fewer tokens than the settings ask for, or leaves ranks idle."""
    notes, bins = [], order.bins_per_step
    each = min(budget, capacity)
    if bins * each < budget:
        notes.append(
            f"train.tokens_per_step {budget} is no multiple of data.max_length {capacity}: "
            f"a step has {bins} × {each} = {bins * each} tokens"
        )
    if bins % ranks:
        full = -(-bins // ranks) * ranks
        notes.append(
            f"a step's {bins} bins of {each} tokens do not divide by {ranks} ranks: some have nothing to do in part of "
            f"it; train.tokens_per_step {full * each} would fill them"
        )
    return notes


def _steps(order: Order, epochs: float) -> int:
    full_epochs = sum(order.steps_in_epoch(epoch) for epoch in range(floor(epochs)))
    rest = epochs - floor(epochs)
    part = round(rest * order.steps_in_epoch(floor(epochs))) if rest else 0
    return max(1, full_epochs + part)
