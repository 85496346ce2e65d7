"""The teacher of a run whose objective has one: a second, frozen model, or the run's own model without its techniques.

A teacher gives hidden states, and logits of the rows of a tile when a tile asks for them. Its head is called once with
the rest of the model, as in any forward, and its gathered parameters stay until the loss is there: ranks may have
different numbers of tiles, and a gather for each would wait without end.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from treering.anatomy import Anatomy
from treering.anatomy.blocks import body
from treering.core.errors import PlanError
from treering.core.module_forward import ModuleForward, install
from treering.core.sharded import end_forward, keep_gathered
from treering.objectives import INPUTS, Objective, OutputHead, TeacherStates
from treering.plan.conflicts import name_of
from treering.store.untrusted import open_tokenizer
from treering.technique import Applied, Stage, Technique, Without, recomputing

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.device_mesh import DeviceMesh

    from treering.plan.plan import Plan

BASE = "base"
SETTING = "objective.distill.teacher"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def teacher_of(objective: Objective | None) -> str | None:
    """Return the teacher that an objective names; None: it has none."""
    return getattr(objective, "teacher", None)


class HiddenForward(ModuleForward):
    """The output of the model; or its last hidden states, of all positions."""

    def __init__(self, model: nn.Module, body: nn.Module, head: nn.Module):
        super().__init__(model)
        self.body, self.head = body, head

    def __call__(self, *args: Any, treering_hidden: bool = False, **kwargs: Any) -> Any:
        if not treering_hidden:
            return self.call_former(*args, **kwargs)
        hidden_BSH = self.body(*args, **kwargs, use_cache=False).last_hidden_state
        self.head(hidden_BSH[:1, :1])  # gathers its parameters, which `Teacher.logits` uses
        return hidden_BSH


def install_hidden(model: Any, anatomy: Anatomy) -> "Callable[[], None]":
    """Let `model` give its hidden states. Return a function that removes this."""
    head = anatomy.head
    if head is None or head.unknown:
        what = "it has no head" if head is None else f"its forward uses {', '.join(head.unknown)}"
        raise PlanError(
            f"{SETTING}: what this {anatomy.model_type} model does to its logits is not understood ({what}), so it "
            "cannot be a teacher; name another one",
            settings=(SETTING,),
        )
    return install(HiddenForward(model, body(model), model.get_submodule(head.fqn)))


def install_base(objective: Objective | None, model: Any, anatomy: Anatomy) -> "list[Callable[[], None]]":
    """Let `model` give its hidden states if it is its own teacher. Return what removes this."""
    return [install_hidden(model, anatomy)] if teacher_of(objective) == BASE else []


class Teacher:
    """Computes hidden states of the batches of a run, without gradients, and logits of some of their rows.

    Args:
        plan: of the model, which has `HiddenForward`.
        without: opens a context in which that model computes as a teacher.
        frees: whether gathered parameters are freed after each batch: not where the model itself trains.
    """

    def __init__(self, plan: "Plan", without: Without, *, frees: bool):
        head = plan.anatomy.head
        assert head is not None, "install_hidden refuses a model without a head"
        self.model, self.without, self.frees = plan.model, without, frees
        module = self.model.get_submodule(head.fqn)
        keep_gathered(module)
        # Without hooks, which would gather and free the head for each tile.
        self.head = OutputHead(
            module=module, scale=head.scale, softcap=head.softcap, forward=lambda hidden: module.forward(hidden)
        )

    @classmethod
    def of(cls, plan: "Plan") -> "Teacher | None":
        """Return the teacher of a run; None where its objective has none."""
        if plan.teacher is not None:
            return cls(plan.teacher, nullcontext, frees=True)
        return cls(plan, plan.without, frees=False) if teacher_of(plan.objective) == BASE else None

    @contextmanager
    def teaching(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Give the batch with what the teacher computes of it. Every rank opens this once for each micro-batch."""
        inputs = {name: batch[name] for name in INPUTS if batch.get(name) is not None}
        training = [module for module in self.model.modules() if module.training]
        try:
            for module in training:
                module.training = False  # a teacher drops nothing and draws no random number
            with torch.no_grad(), self.without(), recomputing("teacher"):
                hidden_BSH = self.model(**inputs, treering_hidden=True)
        finally:
            for module in training:
                module.training = True
        try:
            yield {**batch, "teacher": TeacherStates(hidden_BSH, self.logits)}
        finally:
            if self.frees:
                end_forward(self.model)

    @torch.no_grad()
    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Return the logits of rows, in float32 or wider."""
        with self.without(), recomputing("teacher"):
            return self.head.logits(hidden_NH)


def refuse_base(objective: Objective | None, techniques: Sequence[Technique], applied: Sequence[Applied]) -> None:
    """Raise PlanError where the model is to be its own teacher, and does not keep what it was, or never was that."""
    if teacher_of(objective) != BASE:
        return
    for technique, one in zip(techniques, applied):
        if technique.stage == Stage.QUANTIZE and one.without is None:
            raise PlanError(
                f"{SETTING} is base, and {name_of(technique)} keeps weights in few bits: without its adapters the "
                "model is the quantized one, not the one that quantizing started from. Name the folder of the "
                "unquantized model as teacher (or that of the quantized one, if it is what you mean)",
                settings=(SETTING, f"techniques.{name_of(technique)}"),
            )
        if one.trainable and one.without is None:
            raise PlanError(
                f"{SETTING} is base, and {name_of(technique)} trains weights that the model does not keep a copy of. "
                "Name a folder as teacher, such as that of the model itself, or train adapters (lora)",
                settings=(SETTING, f"techniques.{name_of(technique)}"),
            )


def techniques_for(techniques: Sequence[Technique], student: Anatomy, mesh: "DeviceMesh | None") -> list[Technique]:
    """Return the techniques of the teacher of a run of the model `student` that has `techniques`."""
    return [one.for_teacher(student, mesh) for one in techniques if hasattr(one, "for_teacher")]


def vocabulary(anatomy: Anatomy) -> int:
    """Return how many logits a position has."""
    head = anatomy.head
    assert head is not None, "install_hidden refuses a model without a head"
    return anatomy.parameters[head.tied_to or head.weight].shape[0]


def check_vocabulary(student: Anatomy, folder: Path | None, teacher: "Plan") -> str | None:
    """Raise PlanError unless an id means the same token to both. Return a note where that cannot be seen."""
    name = teacher.source_name
    if student.head is None:
        raise PlanError(f"{SETTING}: the model has no head, and a teacher's probabilities are of tokens")
    own, others = vocabulary(student), vocabulary(teacher.anatomy)
    if own != others:
        raise PlanError(
            f"{SETTING}: {name} has {others:,} logits for each position, and the model has {own:,}. Probabilities of "
            "different vocabularies cannot be compared, also where one is the padded form of the other: take a teacher "
            "with the same vocabulary, or give both as many rows (transformers: model.resize_token_embeddings)",
            settings=(SETTING, "model.path"),
        )
    if folder is None or teacher.folder is None or not (_has_tokenizer(folder) and _has_tokenizer(teacher.folder)):
        return f"teacher {name}: not both have a tokenizer next to their weights; an id is taken for the same token"
    mine, theirs = (open_tokenizer(place).get_vocab() for place in (folder, teacher.folder))
    if mine == theirs:
        return None
    differing = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    token = differing[0]
    raise PlanError(
        f"{SETTING}: the tokenizer of {name} is another one: {len(differing):,} tokens differ, such as {token!r}, "
        f"which is {_place(mine, token)} in {folder} and {_place(theirs, token)} in {teacher.folder}. Take "
        "a teacher of the same family",
        settings=(SETTING, "model.path"),
    )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def _place(ids: dict[str, int], token: str) -> str:
    return f"id {ids[token]}" if token in ids else "no token"
