"""The tokenizer of a run, its data in the order of training, and whether these fit the model.

The fit is checked before any weight is read: an index error during a run would not explain it.
"""

from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from treering.core.errors import PlanError
from treering.core.topology import data_rank
from treering.data.chat.template import Template
from treering.data.config import Format
from treering.data.encoding_recipe import ALPACA
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
    notes: tuple[str, ...] = ()  # messages for the start of the run

    @property
    def fill(self) -> float:
        """The share of the first epoch's bins that holds tokens."""
        return self.train.order.fill(0)


def open_tokenizer(job: Job) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of the job's model folder."""
    return trust.open_tokenizer(locate(job.model.path))


def open_data(
    job: Job, tokenizer: "PreTrainedTokenizerBase", plan: Plan, kept: NDArray[np.bool_] | None = None
) -> RunData:
    """Return the documents of the job, tokenised, in the order of training. The first rank to call it tokenises.

    Args:
        kept: which of the training documents have a loss; None: all.
    """
    packing: Literal["on", "off"] = "off" if plan.unpackable or job.data.packing == "off" else "on"
    if plan.unpackable and job.data.packing == "on":
        raise PlanError(f"data.packing is on, but {plan.unpackable}; set it to off or auto", settings=("data.packing",))
    rank, ranks = data_rank(plan.mesh)
    capacity = job.data.max_length
    budget = job.train.tokens_per_step or capacity * ranks
    examples = build(job.data, tokenizer, "train")
    examples = examples if kept is None else examples.only(kept)
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


def encode(tokenizer: "PreTrainedTokenizerBase", prompt: str, template: str | None) -> torch.Tensor:
    """Return the tokens of a user's turn in the run's chat template, or of plain text where the run has none."""
    if template is not None:
        named = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        turns = [{"role": "user", "content": prompt}]
        rendered = Template(source=template, variables=named).render(turns, None, "train.evaluate.prompts", prompt=True)
        encoded: Any = tokenizer(rendered.text, add_special_tokens=False, return_tensors="pt")
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    return encoded["input_ids"].long()  # transformers gives floats for an empty prompt


def check_fit(job: Job, plan: Plan, tokenizer: "PreTrainedTokenizerBase", data: RunData) -> list[str]:
    """Raise PlanError where data and model do not fit. Return notes on what fits only in part."""
    prompts = _prompts(job, tokenizer, data)
    _check_vocabulary(job, plan, tokenizer, data, prompts)
    notes = _check_positions(job, plan, data, prompts)
    return notes if plan.teacher is None else [*notes, *_check_positions(job, plan.teacher, data, [])]


def _check_positions(job: Job, plan: Plan, data: RunData, prompts: list[list[int]]) -> list[str]:
    positions = getattr(plan.model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return []
    notes = []
    learned = any(p.role == "position" for p in plan.anatomy.parameters.values())
    for problem, remedy, setting in _too_long(job, data, prompts, positions):
        text = f"{problem}, and {plan.source_name} has {positions} positions"
        if learned:  # there is no row in its table for the others
            raise PlanError(f"{text}; {remedy}", settings=(setting,))
        notes.append(text)
    return notes


def _prompts(job: Job, tokenizer: "PreTrainedTokenizerBase", data: RunData) -> list[list[int]]:
    tokens = [encode(tokenizer, prompt, data.template)[0].tolist() for prompt in job.train.evaluate.prompts]
    for i, ids in enumerate(tokens):
        if not ids:
            name = f"train.evaluate.prompts[{i}]"
            raise PlanError(f"{name} has no token to continue; write some text, or leave it out", settings=(name,))
    return tokens


def _check_vocabulary(
    job: Job, plan: Plan, tokenizer: "PreTrainedTokenizerBase", data: RunData, prompts: list[list[int]]
) -> None:
    rows = plan.model.get_input_embeddings().weight.shape[0]
    size = max(len(tokenizer), *(i + 1 for i in tokenizer.added_tokens_decoder), 0)
    if size <= rows:
        return
    # A token that no document has is no error: many tokenizers have spare ones.
    beyond = [(i, ids) for i, ids in enumerate(prompts) if max(ids) >= rows]
    where, token = (f"train.evaluate.prompts[{beyond[0][0]}]", max(beyond[0][1])) if beyond else ("", 0)
    for examples in (data.examples, data.held_out):
        where, token = _beyond(examples, rows) or (where, token)
    if where:
        raise PlanError(
            f"{where} has token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), and the embedding of "
            f"{job.model.path} has {rows} rows. Use the tokenizer that the model was trained with, or give the model "
            f"rows for new tokens first (transformers: model.resize_token_embeddings({size})) and save it",
            settings=("model.path",),
        )


def _beyond(examples: Examples | None, rows: int) -> tuple[str, int] | None:
    for i in range(0 if examples is None else len(examples)):
        document = examples.document(i)  # type: ignore[union-attr]
        if (token := int(document.ids.max())) >= rows:
            return document.sample_id, token
    return None


def _too_long(job: Job, data: RunData, prompts: list[list[int]], positions: int) -> list[tuple[str, str, str]]:
    """Return (problem, what to write instead, the setting) of documents and prompts that need too many positions."""
    problems = []
    for examples in (data.examples, data.held_out):
        if examples is not None and (longest := int(examples.lengths.max())) > positions:
            name = examples.sample_id(int(np.argmax(examples.lengths)))
            remedy = f"set data.max_length to at most {positions}"
            problems.append((f"{name} has {longest} tokens", remedy, "data.max_length"))
    for i, ids in enumerate(prompts):
        name, new = f"train.evaluate.prompts[{i}]", job.train.evaluate.new_tokens
        if len(ids) + new > positions:
            what = f"{name} has {len(ids)} tokens and {new} follow it"
            problems.append((what, "shorten it, or lower train.evaluate.new_tokens", name))
    return problems
