"""What happens around a run: other containers, full disks, a launcher or a tokeniser that is killed."""

import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Literal

from tests import namespaces, toy_run
from tests.chaos import ranks, toy
from tests.chaos.kills import Proving
from tests.chaos.toy import Kind
from treering.data import cache
from treering.data.examples import build
from treering.plan.prepared import Prepared
from treering.store import disk
from treering.train import Job, run, train
from treering.train.checkpoints import manager
from treering.train.checkpoints.files import newest
from treering.train.prepare import open_tokenizer
from treering.train.ranks import lock
from treering.train.reporter import Reporter

PAUSE = 3.0  # seconds: more than ranks allow a dead one
ENDED = re.compile(r"^treering\.core\.errors\.(?:Data|Checkpoint)Error: .*", re.MULTILINE)


def _wait(until: Callable[[], bool], what: str) -> None:
    limit = time.monotonic() + ranks.PATIENCE
    while not until():
        if time.monotonic() > limit:
            raise ranks.Hung(what)
        time.sleep(0.02)


# PID namespaces


def held(root: Path, kind: Kind, output: str, gate: Path | None) -> None:
    """What a rank does: train, and with a gate wait at the first touch of the disk until it is opened."""
    lock.BEAT, lock.STALE = 0.2, 3.0

    def crossing(point: str) -> None:
        if gate is not None:
            gate.with_suffix(".reached").touch()
            _wait(gate.exists, "nobody opens the gate")

    disk.crossing = crossing
    train(toy.job(root, kind, output))


class Containers:
    """Runs whose ranks are each in a PID namespace of their own, on one machine and under one host name."""

    def __init__(self, proving: Proving):
        self.proving, self.root = proving, proving.root

    def cases(self) -> Iterator[tuple[str, Callable[[], None]]]:
        if namespaces.allowed():
            yield "a second run in a folder is refused", self.second
            yield "a killed run is taken over when nobody touches its lock", self.killed
            yield "a rank that is paused is not taken for dead", self.paused

    def _begin(self, kind: Kind, name: str) -> tuple[ranks.Ranks, Path]:
        """Start a run, and wait until it saves its first checkpoint."""
        gate = self.root / f"{name}.gate"
        self.proving.whole(kind)
        began = ranks.start(kind.ranks, held, self.root, kind, name, gate, apart=True)
        began.met()
        _wait(gate.with_suffix(".reached").exists, "it does not come to its first checkpoint")
        return began, gate

    def second(self) -> None:
        kind = Kind(ranks=1)
        first, gate = self._begin(kind, "containers-second")
        try:
            with suppress(ranks.Ended):
                ranks.start(1, held, self.root, kind, "containers-second", None, apart=True).finished()
                raise AssertionError("two runs have one folder")
        finally:
            gate.touch()
            assert first.join(), "the first run was disturbed"
        self.proving.check_end(kind, "containers-second")

    def killed(self) -> None:
        kind = Kind(ranks=1)
        first, _ = self._begin(kind, "containers-killed")
        first.kill(0)
        assert not first.join()
        ranks.start(1, held, self.root, kind, "containers-killed", None, apart=True).finished()
        self.proving.check_end(kind, "containers-killed")

    def paused(self) -> None:
        kind = Kind(ranks=2)
        began, gate = self._begin(kind, "containers-paused")
        (inside,) = namespaces.children(began.pids[1])
        ranks.send(inside, signal.SIGSTOP)
        time.sleep(PAUSE)
        ranks.send(inside, signal.SIGCONT)
        gate.touch()
        assert began.join(), "a paused rank was taken for dead"
        self.proving.check_end(kind, "containers-paused")


# Full disks

PHASES: dict[str, tuple[Any, str]] = {
    "the lock": (lock, "_take"),
    "tokens": (run, "open_data"),
    "prepared results": (Prepared, "write"),
    "the configuration": (Reporter, "started"),
    "metrics": (Reporter, "stepped"),
    "a checkpoint": (manager.CheckpointManager, "save"),
}
ROOM = (0, 100, 3_000, 20_000, 60_000)


def own_cache(root: Path, kind: Kind, output: str) -> Job:
    job = toy.job(root, kind, output)
    return replace(job, data=replace(job.data, cache=str(root / f"{output}-tokens")))


def limited(root: Path, kind: Kind, output: str, phase: str | None, room: int) -> None:
    """What a rank does: train, and from `phase` on no file may grow beyond `room` bytes."""
    if phase is not None:
        where, name = PHASES[phase]
        plain = getattr(where, name)

        def full(*arguments: Any, **keywords: Any) -> Any:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            return plain(*arguments, **keywords)

        setattr(where, name, full)
    train(own_cache(root, kind, output))


def fill(proving: Proving, random: Random, number: int) -> Literal["refused", "fits"]:
    """Fill the disk at a phase: an error with a path, and after space was made the run ends as if nothing had been."""
    phase, room = sorted(PHASES)[number % len(PHASES)], random.choice(ROOM)
    technique = "lora" if phase == "prepared results" else random.choice(("full", "lora"))
    kind, name = Kind(ranks=1, technique=technique, every=random.choice((1, 2))), f"full-{number}"
    proving.whole(kind)
    end: Literal["refused", "fits"] = "fits"
    try:
        ranks.start(1, limited, proving.root, kind, name, phase, room).finished()
    except ranks.Ended as error:
        end, ended = "refused", ENDED.findall(str(error))
        message = f"{phase}, {room} bytes: {error}"
        assert ended and "File too large" in ended[-1] and str(proving.root) in ended[-1], message
    ranks.start(1, limited, proving.root, kind, name, None, 0).finished()
    proving.check_end(kind, name)
    return end


# A killed tokeniser


def tokenised(root: Path, folder: str | None, temporary: str, at: int) -> None:
    """What a process does: tokenise, and die at touch number `at` of the disk; with 0, leave nothing but the tokens."""
    tempfile.tempdir = temporary
    count = 0

    def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
        def touch(*arguments: Any, **keywords: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                signal.raise_signal(signal.SIGKILL)
            return plain(*arguments, **keywords)

        return touch

    cache.CacheWriter._put = counted(cache.CacheWriter._put)  # type: ignore[method-assign]
    disk.write, disk.publish = counted(disk.write), counted(disk.publish)
    job = toy_run.job(root, data={"cache": folder})
    examples = build(job.data, open_tokenizer(job))
    assert not at or count < at, "it was to be killed"
    assert len(examples.document(39).ids)
    left = list(Path(folder or temporary).iterdir())
    assert len(left) == 1, f"a killed tokeniser has left {left}"


def kill_tokeniser(root: Path, random: Random, number: int) -> None:
    """Kill it up to three times, then let it come to its end."""
    at_home = root / f"tokeniser-{number}"
    folder = str(at_home / "tokens") if random.random() < 0.5 else None
    (at_home / "temporary").mkdir(parents=True)
    apart = namespaces.allowed() and random.random() < 0.3
    for at in [random.randrange(1, 12) for _ in range(random.randrange(1, 4))] + [0]:
        began = ranks.start(1, tokenised, root, folder, str(at_home / "temporary"), at, apart=apart and at == 0)
        began.met()
        assert began.join() == (at == 0)


# A killed launcher


def kill_launcher(root: Path, random: Random, number: int) -> None:
    """SIGKILL of `treering train --nproc 2`: its ranks save and stop, or end where there is nothing to save."""
    (root / "launchers").mkdir(exist_ok=True)
    output, steps = root / f"launcher-{number}", random.choice((0, 1, 5, 20)) if number else 2
    job = toy_run.job(root / "launchers")
    file = root / f"launcher-{number}.yaml"
    file.write_text(
        f"model: {job.model.path}\ndata: {{train: {job.data.train}, max_length: 128, cache: {job.data.cache}}}\n"
        f"techniques: {{full: , shard: }}\noutput: {output}\n"
        "train: {tokens_per_step: 256, steps: 100000, log_every: 1, checkpoint: {every: 100000}}\n"
    )
    errors = root / f"launcher-{number}.err"
    with errors.open("w") as written:
        words = [sys.executable, "-m", "treering", "train", str(file), "--nproc", "2"]
        launcher = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=written)
    metrics = output / "metrics.jsonl"
    _wait(lambda: launcher.poll() is not None or len(namespaces.children(launcher.pid)) == 2, "no ranks")
    assert launcher.poll() is None, errors.read_text()
    started = namespaces.children(launcher.pid)
    if steps:
        _wait(lambda: launcher.poll() is not None or _steps(metrics) >= steps, "no steps")
    else:
        time.sleep(random.random() * 8)
    taken = _steps(metrics)
    assert launcher.poll() is None, errors.read_text()
    launcher.kill()
    launcher.wait()
    _wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), "ranks outlive their launcher")
    problems: list[str] = []
    found = newest(output / "checkpoints", problems.append)
    assert not problems and not (output / lock.NAME).exists(), problems
    assert found is not None and found.step >= taken if taken else True, f"{taken} steps: {errors.read_text()[-2000:]}"


def _steps(metrics: Path) -> int:
    """Return how many steps a run has reported."""
    return metrics.read_text(encoding="utf-8").count('"kind": "step"') if metrics.exists() else 0
