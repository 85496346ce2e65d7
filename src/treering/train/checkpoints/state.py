"""The tensors of a run that a checkpoint holds, by name, and how they are restored."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from treering.core.errors import CheckpointError
from treering.core.sharded import local_rows, put_rows
from treering.plan import Run
from treering.plan.prepared import weight_of
from treering.plan.refill import unsaved
from treering.store.untrusted import visible
from treering.train.checkpoints.files import CheckpointTensor


def tensors(run: Run, optimizers: Sequence[Optimizer], prepared: Collection[str] = ()) -> dict[str, Tensor]:
    """Return parameters that differ from the source's, technique states, and the optimizers' moments.

    `prepared` names prepared results, by `prepared.label`, that hold what need not be saved (`Part.saved`); without it,
    the tensors depend on no other folder.
    """
    live = run.plan.live()
    elsewhere = {weight_of(label) for label in prepared}
    omitted = {name for weight, names in unsaved(run.plan).items() if weight in elsewhere for name in names}
    tensors: dict[str, Tensor] = {name: live[name] for name in run.plan.owned if name not in omitted}
    tensors |= _states(run)
    names: dict[Tensor, str] = {p: name for name, p in run.trainable()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{names[parameter]}/{key}"] = value
    return tensors


@torch.no_grad()
def restore_optimizers(run: Run, optimizers: Sequence[Optimizer], saved: Mapping[str, CheckpointTensor]) -> None:
    """Restore moments by parameter name. The groups' settings come from the configuration, not from the file."""
    by_parameter: dict[str, dict[str, CheckpointTensor]] = {}
    for name, tensor in saved.items():
        if name.startswith("optimizer/"):
            if name.count("/") != 2:
                raise CheckpointError(
                    f"the checkpoint has optimizer state called {visible(name)}, which names no parameter"
                )
            _, parameter, key = name.split("/")
            by_parameter.setdefault(parameter, {})[key] = tensor
    names = {p: name for name, p in run.trainable()}
    unknown = sorted(set(by_parameter) - set(names.values()))
    if unknown:
        raise CheckpointError(
            f"the checkpoint has optimizer state for {visible(unknown[0])}, which is not trained here"
        )
    for optimizer in optimizers:
        state: dict[int, dict[str, Any]] = {}
        index = 0
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                moments = by_parameter.get(names[parameter], {})
                if moments:
                    state[index] = {key: _like(parameter, tensor) for key, tensor in moments.items()}
                index += 1
        packed = optimizer.state_dict()
        optimizer.load_state_dict({"state": state, "param_groups": packed["param_groups"]})


def _states(run: Run) -> dict[str, Tensor]:
    states = [applied.state() for applied in run.plan.applied if applied.state is not None]
    by_name = {f"state/{name}": value for state in states for name, value in state.items()}
    assert len(by_name) == sum(map(len, states)), "two techniques keep state under one name"
    return by_name


@torch.no_grad()
def restore_techniques(run: Run, saved: Mapping[str, CheckpointTensor]) -> None:
    """Restore the state of techniques that is not parameters, into the tensors that `Applied.state` returns."""
    for name, value in _states(run).items():
        if name not in saved:
            raise CheckpointError(f"the checkpoint lacks {name}, which a technique of this run keeps")
        put_rows(value, saved[name].rows(*local_rows(value)) if value.ndim else saved[name].read())


def _like(parameter: Tensor, saved: CheckpointTensor) -> Tensor:
    """Return `saved` sharded as `parameter` is where it has its shape, else complete: a step counter."""
    if not saved.shape or saved.shape != tuple(parameter.shape):
        return saved.read()
    value = torch.empty_like(parameter, dtype=saved.dtype)
    put_rows(value, saved.rows(*local_rows(parameter)))
    return value
