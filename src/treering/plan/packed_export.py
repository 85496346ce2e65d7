"""The quantized weights of a model as codes and scales in a folder, and why adapters are not merged into them."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from treering.core.collectives import is_first
from treering.core.errors import CheckpointError, PlanError
from treering.plan.plan import Chain, Plan, join
from treering.plan.values import Values, groups, joined, joined_names, take_part
from treering.technique import Packing
from treering.weights.conversion import to_file_layout
from treering.weights.quantized.opened import open_quantized
from treering.weights.quantized.publication import Publication, publication

SAMPLED = 16  # weights that the cost of merging is measured on, spread over the model


def packing_of(chain: Chain) -> Packing | None:
    """Return how the weight of a chain is published in a number format; None: in none."""
    return next((part.packing for part in chain.parts if part.packing is not None), None)


def publication_of(plan: Plan) -> Publication:
    """Return how the quantized weights of a plan are written. PlanError if there are none, or no layout holds them."""
    packings = {name: found for name, chain in plan.chains.items() if (found := packing_of(chain)) is not None}
    if not packings:
        raise PlanError(
            "no weight of this run is quantized, so there is nothing to write as codes and scales; leave `packed` out, "
            "or add quantize to the techniques",
            settings=("techniques.quantize",),
        )
    to_file = partial(to_file_layout, plan.model)
    return publication(packings, plan.plain, groups(plan), to_file, plan.anatomy.model_type)


@torch.no_grad()
def packed_tensors(
    plan: Plan, values: Values, published: Publication
) -> Iterator[tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], Mapping[str, Tensor]]]]:
    """Yield tensors, with what converts them to those of the folder: first quantized weights, then the others."""
    first = is_first()
    for name, packing in published.packings.items():
        stored = {live: values.read(live) for live in packing.names}
        tensors = {key: t.cpu() for key, t in packing.tensors(stored).items()} if first else {}
        yield tensors, partial(published.tensors, name) if first else dict
    convert = partial(to_file_layout, plan.model)
    for group in groups(plan, [name for name in plan.plain if name not in published.packings]):
        if first:
            yield {name: joined(plan, name, values).cpu() for name in group}, convert
        else:
            for name in group:
                take_part(plan, name, values)
            yield {}, convert


def describe(plan: Plan, published: Publication, folder: Path) -> None:
    """Add how weights are quantized to config.json."""
    plain = [linear.fqn for linear in plan.anatomy.linears if linear.weight not in published.packings]
    plain += [one.fqn for one in plan.anatomy.experts if not set(one.stacked) & published.packings.keys()]
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": published.config(sorted(plain))}
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def check_reopened(published: Publication, folder: Path) -> None:
    """Raise CheckpointError unless the folder is read as the weights and formats that were written."""
    opened = open_quantized(folder)
    found = {} if opened is None else {name: weight.form.label for name, weight in opened.weights.items()}
    written = {key: form.label for key, form in published.forms().items()}
    if found != written:
        different = sorted(key for key in found.keys() | written.keys() if found.get(key) != written.get(key))
        raise CheckpointError(f"{folder}: {different[0]} is read in another format than was written")


def refuse_merging(plan: Plan, values: Values) -> None:
    """Raise PlanError where adapters would have to be merged into quantized weights, with what that would lose.

    Every rank calls it; a collective where the model is sharded.
    """
    adapted = [
        name for name, chain in plan.chains.items() if packing_of(chain) is not None and len(chain.parts) > 1
    ]  # fmt: skip
    if not adapted:
        return
    step = max(1, len(adapted) // SAMPLED)
    sample = adapted[::step][:SAMPLED]
    costs = [requantized(plan, name, values) for name in sample]
    error, change, kept = (torch.tensor(column).double() for column in zip(*costs, strict=True))
    names = [one.adapter.name for one in plan.applied if one.adapter is not None]
    example = f"write adapter {names[0]} next to them (--adapter {names[0]})" if names else "export the dense model"
    shown = "it adds nothing yet" if not change.any() else f"{float(kept.median()):.0%} of it would remain"
    raise PlanError(
        f"{len(adapted)} quantized weights have adapters, and codes cannot hold their sum: quantizing it again gives "
        f"an error of {float(error.median()):.2%} of a weight, the adapter is {float(change.median()):.2%}, and "
        f"{shown} (medians of {len(sample)} weights). Instead {example}, or export the dense model, where both are "
        "merged without a loss",
        settings=("techniques.lora",),
    )


@torch.no_grad()
def requantized(plan: Plan, name: str, values: Values) -> tuple[float, float, float]:
    """Return what merging a weight's adapters into its format would cost.

    With Q the quantized weight, D what adapters add, and Q' = quantize(Q + D):

    Returns:
        ‖Q' − (Q + D)‖ / ‖Q‖, ‖D‖ / ‖Q‖, and the share ⟨Q' − Q, D⟩ / ‖D‖² of D that Q' has.
    """
    chain = plan.chains[name]
    packing = packing_of(chain)
    assert packing is not None
    tensors = {n: values.read(n) for n in {*joined_names(chain), *packing.names}}
    shape, dtype = plan.plain[name]
    base = values.read(name) if name in values.names else torch.zeros(shape, dtype=dtype)
    position = next(i for i, part in enumerate(chain.parts) if part.packing is packing)
    quantized = join(chain.parts[: position + 1], tensors, base)
    merged = join(chain.parts, tensors, base)
    oriented = merged.mT if packing.transposed else merged
    again = packing.form.decode(packing.form.encode(oriented.to(dtype)), oriented.shape[-1], merged.dtype)
    again = again.mT if packing.transposed else again
    norm, added = quantized.norm().clamp_min(1e-30), merged - quantized
    share = float(((again - quantized) * added).sum() / added.square().sum()) if bool(added.any()) else 0.0
    return float((again - merged).norm() / norm), float(added.norm() / norm), share
