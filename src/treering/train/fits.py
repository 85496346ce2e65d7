"""Checks that the data fits the model, before any weight is read: an index error during a run would not explain it."""

from typing import TYPE_CHECKING

import numpy as np

from treering.core.errors import PlanError
from treering.data.examples import Examples
from treering.plan import Plan
from treering.train.config import Job
from treering.train.evaluate import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from treering.train.prepare import RunData


def check(job: Job, plan: Plan, tokenizer: "PreTrainedTokenizerBase", data: "RunData") -> list[str]:
    """Raise PlanError for what cannot work. Returns notes on what works and a person should know."""
    prompts = _prompts(job, tokenizer, data)
    _check_vocabulary(job, plan, tokenizer, data, prompts)
    positions = getattr(plan.model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return []
    notes = []
    learned = any(p.role == "position" for p in plan.anatomy.parameters.values())
    for problem, remedy, setting in _too_long(job, data, prompts, positions):
        text = f"{problem}, and {plan.source_name} was made for {positions} positions"
        if learned:  # there is no row in its table for the others
            raise PlanError(f"{text}; {remedy}", settings=(setting,))
        notes.append(text)
    return notes


def _prompts(job: Job, tokenizer: "PreTrainedTokenizerBase", data: "RunData") -> list[list[int]]:
    tokens = [encode(tokenizer, prompt, data.template)[0].tolist() for prompt in job.train.evaluate.prompts]
    for i, ids in enumerate(tokens):
        if not ids:
            name = f"train.evaluate.prompts[{i}]"
            raise PlanError(f"{name} has no token to continue; write some text, or leave it out", settings=(name,))
    return tokens


def _check_vocabulary(
    job: Job, plan: Plan, tokenizer: "PreTrainedTokenizerBase", data: "RunData", prompts: list[list[int]]
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


def _too_long(job: Job, data: "RunData", prompts: list[list[int]], positions: int) -> list[tuple[str, str, str]]:
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
