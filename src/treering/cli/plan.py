"""`treering plan`: what a configuration would do and whether it fits into memory, computed from shapes."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treering.cli.config import ConfigFile, Settings, load
from treering.cli.plan_proposals import Capacity, PlannedRun, proposed
from treering.core.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from treering.cli.schema import RunConfig
    from treering.core.links import Links
    from treering.memory import Forecast, Peak, Subject
    from treering.plan import Plan, Run
    from treering.weights.plain_tensors import Source

UNITS = {"TIB": 2**40, "TB": 10**12, "GIB": 2**30, "GB": 10**9, "MIB": 2**20, "MB": 10**6}


def command(
    file: ConfigFile,
    settings: Settings = None,
    ranks: Annotated[
        int, typer.Option("--ranks", "--world", min=1, max=100_000, help="Plan for this many ranks; none is started.")
    ] = 1,
    gpu: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of one device, such as 80GiB: does it fit, what would?")
    ] = None,
    host: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Host memory of one node, such as 1TiB, for what is offloaded.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of one micro-batch; default: data.max_length.", show_default=False)
    ] = None,
    node: Annotated[int, typer.Option(min=1, help="Ranks of one node, for times of messages.")] = 8,
    inside: Annotated[float, typer.Option(min=0.001, metavar="GB/S", help="What a rank sends in its node.")] = 350.0,
    between: Annotated[float, typer.Option(min=0.001, metavar="GB/S", help="What a rank sends to others.")] = 50.0,
    arithmetic: Annotated[float, typer.Option(min=0.001, metavar="TFLOP/S", help="Of a rank, in products.")] = 400.0,
    schedule: Annotated[bool, typer.Option("--schedule", help="Also the rounds of pairs along sequence.")] = False,
) -> None:
    """Show what would happen: order, memory, messages, time. Reads no weights, trains nothing."""
    limit = None if gpu is None else _bytes(gpu, "--gpu")
    limits = Capacity(device=limit, host=None if host is None else _bytes(host, "--host"), node=node)
    config = load(file, settings)
    from treering.cli.console import say
    from treering.core.links import Links
    from treering.core.topology import sizes
    from treering.memory.traffic import schedule_lines

    tokens = length or config.data.max_length
    links = Links(node=node, inside=1e9 * inside, between=1e9 * between, arithmetic=1e12 * arithmetic)
    state = PlannedRun(config=config, ranks=ranks)
    say(explanation(config, ranks, tokens, links))
    if schedule:
        say("\n" + "\n".join(schedule_lines(sizes(ranks, **asdict(config.mesh))[2])))
    peak = None
    try:
        text, peak = _memory(state, tokens, limits)
        say("\n" + text)
    except PlanError as error:
        if error.settings:
            raise
        say(f"\nmemory: {error}")
    if ranks > 1:
        say("\n" + _meshes(state, tokens, links, limit, peak))


def explanation(config: "RunConfig", ranks: int, tokens: int, links: "Links | None" = None) -> str:
    """Return `explain()` of `config` as rank 0 of `ranks` sees it, for micro-batches of `tokens`; with times by `links`
    where there are several ranks."""
    from treering.core.topology import axis_size
    from treering.memory import pretend
    from treering.memory.traffic import report
    from treering.plan.explain import explain
    from treering.technique import Workload

    with pretend.ranks(ranks):
        plan = _plan(config, asdict(config.mesh))
        once = tokens * axis_size(plan.mesh, "replicate", "shard")
        batches = max(1, -(-(config.train.tokens_per_step or 0) // once))
        work = Workload(tokens=tokens, micro_batches=batches)
        times = "" if links is None else report(plan, work, links)
        return explain(plan, work=work) + (f"\n\n{times}" if times else "")


def _plan(config: "RunConfig", sizes: dict[str, int]) -> "Plan":
    """Return the plan of `config` on a mesh of all ranks of the process group, without weights."""
    from treering.cli.train import job_of
    from treering.core.topology import mesh
    from treering.plan import draft
    from treering.plan.open_model import locate, on_meta
    from treering.train.measurements import find

    folder = locate(config.model.path) if config.model.initialise else None
    return draft(
        config.model.path if folder is None else on_meta(folder, config.model.dtype),  # no weights of the folder
        config.techniques.chosen(),
        mesh=mesh(**sizes, device="cpu"),
        dtype=config.model.dtype,
        seed=config.seed,
        dropout=config.model.dropout,
        statistics=find(job_of(config)),
        roles=config.model.roles,
        objective=config.objective.chosen(),
        dequantize=config.model.dequantize,
        weights=False,
        name=config.model.path,
        folder=folder,
    )


def _meshes(state: PlannedRun, length: int, links: "Links", limit: int | None, peak: "Peak | None") -> str:
    """Return the lines that compare meshes of as many ranks. `peak`: of the configuration's mesh."""
    from treering.core.topology import sizes
    from treering.memory import pretend
    from treering.memory.meshes import MemoryOfMeshes, MeshShape, by_time, mesh_lines, probe_shape, recommended

    config = state.config
    *own, expert = sizes(state.ranks, **asdict(config.mesh))
    shared = config.techniques.ulysses is not None
    probe = probe_shape(expert, shared=shared)
    with pretend.ranks(probe.replicate * probe.sharing), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a mesh that nobody has asked for
        plan = _plan(config, {axis: probe.sizes[axis] for axis in asdict(config.mesh)})
        timed = by_time(
            plan, probe, state.ranks, length, links, tokens_per_step=config.train.tokens_per_step, shared=shared
        )

    def traced(shape: MeshShape) -> "Peak":
        return _forecast(state.on(shape), length).at(length)

    memory = None
    if limit is not None and peak is not None:
        memory = MemoryOfMeshes(traced)
        memory.know(MeshShape(replicate=own[0], shard=own[1], sequence=own[2], expert=expert), peak)
    lines = mesh_lines(*recommended(timed, memory, limit), limit)
    return "\n".join([f"meshes of {state.ranks} ranks, by the time of a token", *(f"  {line}" for line in lines)])


def _memory(state: PlannedRun, length: int, limits: Capacity) -> "tuple[str, Peak]":
    from treering.core.topology import sizes
    from treering.memory.picture import render
    from treering.memory.timeline import LONG

    _, _, sharing, _ = sizes(state.ranks, **asdict(state.config.mesh))
    row = LONG * sharing
    predicted = _forecast(state, length)
    peak = predicted.at(length)
    more, limit = [], limits.device
    if peak.host >= 2**30 / 100:
        more.append(f"needs {limits.line(peak, state.ranks)}")
    if limit is not None:
        long = predicted if length >= row // 2 else _forecast(state, row)
        longest = long.longest(limit)
        more.append(f"longest that fits: {longest:,} tokens" if longest else "no length fits")
    if not limits.allow(peak, state.ranks):
        more += proposed(
            state,
            limits,
            lambda tried: _peak_within(tried, length, predicted, limit),
            lambda tried: _refuse_unusable(tried, length, predicted),
        )
    return render(peak, limit, length, more), peak


def _forecast(state: PlannedRun, length: int) -> "Forecast":
    from treering.memory import forecast

    return forecast(_subject(state.config, state.ranks, length), length)


def _peak_within(state: PlannedRun, length: int, like: "Forecast", limit: int | None) -> "Peak | None":
    """Return the peak of a run; None where a few of its blocks show that it needs more than `limit`."""
    from treering.memory.forecast import TooLarge, forecast

    try:
        return forecast(_subject(state.config, state.ranks, length), length, like=like, most=limit).at(length)
    except TooLarge:
        return None


def _refuse_unusable(state: PlannedRun, length: int, like: "Forecast") -> None:
    from treering.memory.forecast import refuse_unusable

    refuse_unusable(_subject(state.config, state.ranks, length), like)


def _subject(config: "RunConfig", ranks: int, length: int) -> "Subject":
    from treering.core.topology import mesh, sizes
    from treering.memory import Subject, pretend
    from treering.plan.apply import keep_stored
    from treering.plan.open_model import locate, named_dtype, read_config
    from treering.train.optimizers import build

    model = read_config(locate(config.model.path))
    stored: Any = model.dtype or named_dtype("float32")
    replicas, shards, *_ = sizes(ranks, **asdict(config.mesh))
    once = length * replicas * shards
    recompute = config.techniques.recompute
    by_block = recompute is not None and (recompute.first_blocks is not None or recompute.budget is not None)

    initialise, place = config.model.initialise, (config.model.path, config.model.dtype, config.model.dequantize)
    source = None if initialise else _source(*place)

    def optimizers(run: "Run") -> "Sequence[Optimizer]":
        return build(run, config.train.optimizer)

    return Subject(
        config=model,
        dtype=stored if config.model.dtype == "auto" else named_dtype(config.model.dtype),
        techniques=keep_stored(config.techniques.chosen(), source),
        optimizers=optimizers,
        mesh=lambda: mesh(**asdict(config.mesh), device=pretend.NAME),
        world=ranks,
        clip=config.train.clip,
        micro_batches=2 if (config.train.tokens_per_step or 0) > once else 1,
        all_blocks=by_block,
        seed=config.seed,
        dropout=config.model.dropout,
        roles=config.model.roles,
        objective=config.objective.chosen(),
    )


@cache
def _source(path: str, dtype: str, dequantize: bool) -> "Source | None":
    """Return the tensors of a folder with quantized weights, once for all forecasts; None: it has none."""
    from treering.plan import open_model

    folder = open_model.locate(path)
    model = open_model.on_meta(folder, dtype)
    quantized = open_model.quantized_weights(folder, decode=dequantize)
    return None if quantized is None else open_model.source_of(model, folder, quantized, keep=not dequantize)


def _bytes(text: str, option: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(TiB|TB|GiB|GB|MiB|MB)\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        what = "one device, such as 80GiB" if option == "--gpu" else "one node's host, such as 1TiB"
        raise ConfigError(f"{option} is {text!r}; write the memory of {what}", field=option)
    return int(float(match[1]) * UNITS[match[2].upper()])
