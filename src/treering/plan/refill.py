"""Tensors that a checkpoint omits because prepared results contain them, and how a resume reads them."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch.distributed as dist

from treering.core.collectives import together
from treering.core.errors import CheckpointError
from treering.plan.load import refuse_inexact
from treering.plan.plan import Plan, Statistics
from treering.plan.prepared import Prepared, weight_of
from treering.plan.run import Run
from treering.plan.splitting import prepare
from treering.technique import LazyTensor
from treering.weights.plain_tensors import plain_tensors


def unsaved(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Return for each plain weight the live names whose values a checkpoint omits: see `Part.saved`."""
    names = {
        weight: tuple(name for part in chain.parts if not part.saved for name in part.names)
        for weight, chain in plan.chains.items()
    }
    trained = {name for applied in plan.applied for name in applied.trainable}
    for unsaved_names in names.values():
        wrong = sorted(trained & set(unsaved_names))
        assert not wrong, f"{wrong[0]} is trained, so its part must be saved"
    return {weight: unsaved_names for weight, unsaved_names in names.items() if unsaved_names}


def recorded(run: Run) -> dict[str, str]:
    """Return the digests of the prepared results that a checkpoint of `run` may rely on, by `prepared.label`.

    Empty for a run whose results are in no folder: its checkpoints have to contain everything.
    """
    if run.prepared is None:
        return {}
    needed = unsaved(run.plan)
    results = {name: result for name, result in run.prepared.results.items() if weight_of(name) in needed}
    return {name: run.prepared.digest(result) for name, result in results.items()}


def refuse_incomplete(plan: Plan, saved: Collection[str]) -> None:
    """Raise CheckpointError if a tensor of the plan has no value in `saved`."""
    absent = [name for name in plan.owned if name not in saved]
    if not absent:
        return
    if all(name in {n for names in unsaved(plan).values() for n in names} for name in absent):
        raise CheckpointError(
            f"the checkpoint leaves {absent[0]} and {len(absent) - 1} more tensors to a folder of prepared results; "
            "pass its tensors through treering.plan.refill.completed, which takes them from there"
        )
    raise CheckpointError(f"the checkpoint has no {absent[0]} and {len(absent) - 1} more that this run trains")


def completed(
    plan: Plan,
    saved: Mapping[str, LazyTensor],
    digests: Mapping[str, str],
    prepared: Prepared | Path,
    *,
    checkpoint: str,
    statistics: Statistics | None = None,
    changed: Collection[str] = (),
    exported_only: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, LazyTensor]:
    """Return every tensor of `plan.owned`: the saved ones, and the rest from prepared results. All ranks call it.

    A result is looked up by its digest, so that the values are bitwise those of the run that was saved. One that is
    missing or damaged is computed again from the model and the statistics, and `note` reports how equal it is.

    Args:
        saved: tensors of the checkpoint.
        digests: of prepared results by `prepared.label`, as the checkpoint records them.
        prepared: the folder of results.
        checkpoint: the checkpoint's name for messages.
        statistics: those that the run began with.
        changed: the inputs of results that have changed since; with any, no result is computed again.
        exported_only: omit what no export reads.
    """
    absent = {
        weight: names
        for weight, names in unsaved(plan).items()
        if not set(names) <= saved.keys() and (not exported_only or _exported(plan, weight) & set(names))
    }
    tensors = dict(saved)
    if not absent:
        return tensors
    needed = {name: digest for name, digest in digests.items() if weight_of(name) in absent}
    if unknown := sorted(absent.keys() - {weight_of(name) for name in needed}):
        raise CheckpointError(
            f"{checkpoint} has no {absent[unknown[0]][0]}, and names no prepared result for it: it is of another run"
        )
    folder = prepared if isinstance(prepared, Prepared) else Prepared(prepared)
    problems = _look_up(folder, absent, needed)
    if problems:
        _make_again(plan, folder, problems, needed, checkpoint, statistics, changed, note)
    for weight, names in absent.items():
        tensors |= {name: folder.tensor(weight, name) for name in names}
    return tensors


def _exported(plan: Plan, weight: str) -> set[str]:
    """Return the names that an export of a weight, or of any adapter, reads."""
    parts = plan.chains[weight].parts
    joined = {name for part in parts for name in (part.names if part.joins is None else part.joins)}
    return joined.union(*(applied.adapter.own for applied in plan.applied if applied.adapter is not None))


def _look_up(folder: Prepared, absent: Mapping[str, tuple[str, ...]], digests: Mapping[str, str]) -> dict[str, str]:
    """Record the results that exist in `folder.results`. Return by label what is wrong with the others.

    Each result is read completely: ranks share the work.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def check() -> dict[str, tuple[str, str]]:
        outcomes = {}
        for label in sorted(digests)[rank::world]:
            name = folder.find(digests[label])
            problem = "missing" if name is None else folder.problem(name, absent[weight_of(label)])
            outcomes[label] = name or "", "missing" if problem is None else problem
        return outcomes

    checked = {k: outcome for part in together(check, f"reading {folder.folder}") for k, outcome in part.items()}
    folder.results |= {label: name for label, (name, problem) in checked.items() if not problem}
    return {label: problem for label, (_, problem) in sorted(checked.items()) if problem}


def _make_again(
    plan: Plan,
    folder: Prepared,
    problems: Mapping[str, str],
    digests: Mapping[str, str],
    checkpoint: str,
    statistics: Statistics | None,
    changed: Collection[str],
    note: Callable[[str], None],
) -> None:
    label, problem = next(iter(problems.items()))
    which = (
        f"{len(problems)} prepared results that {checkpoint} names by digest are not in {folder.folder} "
        f"(that of {label} is {problem})"
    )
    if changed:
        raise CheckpointError(
            f"{which}, and cannot be computed again: this run has another {' and another '.join(changed)} than the one "
            "that was saved. Restore the folder `prepared` of the run, or what was changed"
        )
    if plan.source is None:
        raise CheckpointError(f"{which}, and this plan was drafted without weights to make them from")
    weights = dict.fromkeys(weight_of(label) for label in problems)
    chains = [plan.chains[weight] for weight in weights]
    errors = prepare(plain_tensors(plan.model), plan.source, chains, statistics, folder, note)
    refuse_inexact(plan.chains, errors)
    again = {label for weight in weights for label in folder.labels(weight)}
    different = [label for label in again if folder.digest(folder.results[label]) != digests.get(label)]
    if different:
        end = f"{len(different)} have other bits than before, so this resume is equal to rounding, not bitwise"
    else:
        end = "all have the digests that they had, so this resume is bitwise"
    note(f"{which}; they were computed again from the model and its statistics: {end}")
