"""Measured peaks against the forecast of `treering plan`, and what varying lengths do to the allocator."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.device import GIB, Context
from benchmarks.gpu.models import adamw, batch, build, stepper
from benchmarks.gpu.planned import configurations
from benchmarks.gpu.record import Figure

WITHIN = 0.05  # of the measured peak


def forecast(context: Context) -> Iterator[Figure]:
    """The forecast runs next to the measurements, in a process that sees the card and in one that does not."""
    plans = {"hidden": _plan(context, CUDA_VISIBLE_DEVICES="")}
    if not context.dry:
        plans["visible"] = _plan(context)
    peaks: dict[str, int | None] = {}
    problems: list[Exception] = []
    try:
        for name, (techniques, dtype, times) in configurations().items():
            tokens = times * context.sizes.memory_tokens
            try:
                peaks[name] = _peak(context, techniques, getattr(torch, dtype), tokens)
            except Exception as error:  # the other configurations are measured all the same
                problems.append(RuntimeError(f"{name}: {type(error).__name__}: {error}"))
                continue
            peak = peaks[name]
            yield Figure(figure="measured peak", case=_case(context, name), ours=peak and peak / GIB, unit="GiB")
        wanted = _read(plans["hidden"], context.left())
        for name, peak in peaks.items():
            yield _against_forecast(wanted[name], peak, _case(context, name))
        if "visible" in plans:
            seen = _read(plans["visible"], context.left())
            yield Figure(
                figure="forecasts that do not depend on whether a card is visible", case="configurations",
                ours=sum(seen[name] == wanted[name] for name in wanted), peer=len(wanted), at_least=1.0,
            )  # fmt: skip
    finally:
        for process in plans.values():
            if process.poll() is None:
                process.kill()
                process.wait()
    if problems:
        raise problems[0]


def _case(context: Context, name: str) -> str:
    tokens = configurations()[name][2] * context.sizes.memory_tokens
    return f"{name}; {context.sizes.few} layers, {tokens} tokens"


def _against_forecast(wanted: float, peak: int | None, case: str) -> Figure:
    if peak is None:
        return Figure(figure="forecast of the peak", case=case, ours=wanted / GIB, unit="GiB")
    return Figure(
        figure="forecast of the peak / measured peak", case=case, ours=wanted / GIB, peer=peak / GIB, unit="GiB",
        at_least=1 - WITHIN, at_most=1 + WITHIN,
    )  # fmt: skip


def _plan(context: Context, **environment: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.planned", *["--toy"] * context.toy]
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _read(process: "subprocess.Popen[str]", seconds: float) -> dict[str, float]:
    out, errors = process.communicate(timeout=max(seconds, 1.0))
    if process.returncode:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the forecast ended with exit code {process.returncode}: {last}")
    return json.loads(out.strip().splitlines()[-1])


def _peak(context: Context, techniques: list[Any], dtype: torch.dtype, tokens: int) -> int | None:
    """The peak of the second step, when the optimizer's state is there from the start."""
    device, sizes = context.device, context.sizes
    device.free()
    before = device.allocated()
    run = build(context, sizes.config(sizes.few), techniques, dtype=dtype)
    step = stepper(run, adamw(run), batch(context, tokens))
    step()
    device.synchronize()
    device.reset_peak()
    step()
    device.synchronize()
    peak = device.peak()
    return None if peak is None or before is None else peak - before


def varying(context: Context) -> Iterator[Figure]:
    """Memory that the allocator holds next to what tensors use, over steps of lengths that nobody sorted."""
    import treering as tr

    sizes, device = context.sizes, context.device
    shortest, longest = sizes.varying
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (sizes.varying_steps,), generator=draw).tolist()
    offload = tr.Recompute(offload="cpu")
    for name, techniques in (
        ("recompute, tiled loss", [tr.Recompute(), tr.TiledLoss()]),
        ("recompute with offload, tiled block and loss", [offload, tr.TiledBlock(), tr.TiledLoss()]),
    ):
        device.free()
        device.reset_peak()
        retries = device.retries()
        run = build(context, sizes.config(sizes.few), [tr.Full(), *techniques])
        optimizer = adamw(run)
        done = 0
        for length in lengths:
            if context.left() < 4:
                break
            stepper(run, optimizer, batch(context, length))()
            done += 1
        device.synchronize()
        allocated, reserved, after = device.peak(), device.reserved_peak(), device.retries()
        case = f"{name}; {sizes.few} layers, {done} steps of {shortest} to {longest} tokens"
        yield Figure(
            figure="memory reserved / allocated, peaks", case=case, ours=None if reserved is None else reserved / GIB,
            peer=None if allocated is None else allocated / GIB, unit="GiB",
        )  # fmt: skip
        again = None if after is None or retries is None else after - retries
        yield Figure(figure="allocations that had to be tried again", case=case, ours=again)
        del run, optimizer
