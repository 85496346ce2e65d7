"""Fingerprints of weights: whether statistics were measured on the weights that a model has.

A fingerprint is a digest of three rows of a weight, rounded to bfloat16: a measurement in bfloat16 fits a training in
float32, reading a folder costs a few kilobytes a weight, and a training step changes practically every row.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from treering.core.sharded import local, local_rows, sum_over_rows
from treering.store.tensor_writer import content_of
from treering.technique import LazyTensor
from treering.weights.plain_tensors import PlainTensor, Source

_MOST = 4096  # numbers of a row


@torch.no_grad()
def fingerprints(model: nn.Module, weights: Iterable[str]) -> dict[str, str]:
    """Return those of the weights that the model has as parameters, by name. A collective where they are sharded."""
    parameters = dict(model.named_parameters())
    return {name: _of_parameter(parameters[name]) for name in weights if name in parameters}


def notes_on_weights(statistics: Any, source: Source | None) -> list[str]:
    """Return a note if weights have other values in `source` than those that were measured.

    Stored quantized weights are left out: they may have been measured before they were rounded.
    """
    known: Mapping[str, str] = getattr(statistics, "fingerprints", {})
    tensors = {} if source is None else source.tensors
    present = {name: tensors[name] for name in known if name in tensors and tensors[name].stored is None}
    names = [name for name, tensor in present.items() if _of_tensor(tensor) != known[name]]
    if not names:
        return []
    return [
        f"{statistics.where} was measured on other weights: {len(names)} of {len(known)} differ from those here "
        f"({names[0]}). What it knows of their inputs may not hold for this model: measure this one, unless it has "
        "been trained only a little since"
    ]


def _of_parameter(parameter: Tensor) -> str:
    places, own = _places(parameter.shape), local(parameter)
    start, stop = local_rows(parameter)
    width = min(_MOST, torch.Size(parameter.shape[1:]).numel())
    rows = torch.zeros(len(places), width, dtype=torch.float32, device=own.device)
    for number, place in enumerate(places):
        if start <= place < stop:
            rows[number] = own[place - start].reshape(-1)[:_MOST]
    return _text(sum_over_rows(rows, parameter))


def _of_tensor(tensor: LazyTensor) -> str:
    places = _places(tensor.shape)
    if isinstance(tensor, PlainTensor) and tensor.row_reader is None:  # each row would read all of it
        complete = tensor.read()
        rows = [complete[place] for place in places]
    else:
        rows = [tensor.rows(place, place + 1) for place in places]
    return _text(torch.stack([row.reshape(-1)[:_MOST] for row in rows]))


def _places(shape: Iterable[int]) -> list[int]:
    number = next(iter(shape))
    return sorted({0, number // 2, number - 1})


def _text(rows: Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(content_of(rows.to(torch.bfloat16).cpu()))
