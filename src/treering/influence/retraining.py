"""The losses of queries after training again without some records: the ground truth of scores.

    DIR/validation.json    what was trained: run, training data, queries
    DIR/KEY.json           losses of the queries after training without some records; KEY is a digest of their ids
    DIR/KEY/               a training that is under way, with its checkpoints; removed when its losses are written

A training has the settings of the run, its first weights, its order of documents, its batches and its learning rates.
The records that are left out stay in their batches without a loss, so that two trainings differ in these records alone.
"""

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from treering.core.errors import CheckpointError, DataError
from treering.data.document import Document
from treering.data.loader import collate
from treering.influence.records import record_of
from treering.influence.run_index import RunIndex
from treering.influence.sketched import packing_of
from treering.plan import Run
from treering.store import disk
from treering.store.model_folder import fingerprint
from treering.technique import Stage, Technique
from treering.train.config import Evaluate, Job
from treering.train.export import reopen
from treering.train.run import train

ABOUT = "validation.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """Trains a run again without some of its records, and keeps what became of the queries.

    Args:
        of_run: the run.
        queries: documents by name.
        folder: where losses are written, each as soon as it is known.
        helping: techniques that make a forward fit.
    """

    of_run: RunIndex
    queries: Mapping[str, Document]
    folder: Path
    helping: Sequence[Technique] = ()

    def open(self) -> None:
        """Make the folder, or raise CheckpointError if it has something else, or losses of another run."""
        path, now = self.folder / ABOUT, self._about()
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            if not path.is_file():
                raise CheckpointError(f"{self.folder} has something else than a validation; give another --to")
            then = _read(path)
            if changed := [name for name, value in now.items() if then.get(name) != value]:
                raise CheckpointError(
                    f"{self.folder} has losses of another {' and '.join(changed)}; give another --to, or remove it"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        disk.replace(path, json.dumps(now, indent=1).encode())

    def known(self, left_out: Collection[str]) -> bool:
        """Whether the losses without these records have been written."""
        return self._path(left_out).is_file()

    def losses(self, left_out: Collection[str]) -> NDArray[np.float64]:
        """Return the mean loss per token of each query after training without some records. Trains, if it must."""
        path = self._path(left_out)
        if not path.is_file():
            job = self._job(path.with_suffix(""))
            summary = train(job, kept=self._kept(left_out))
            losses = query_losses(reopen(job, helping=self.helping), self.queries)
            values = {"format": FORMAT, "left out": sorted(left_out), "losses": losses, "seconds": summary["seconds"]}
            disk.replace(path, json.dumps(values).encode())
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)  # also that of a process that ended just before this
        losses = _read(path).get("losses", [])
        if len(losses) != len(self.queries):
            raise CheckpointError(f"{path} is damaged; remove it, and run the command again")
        return np.asarray(losses, dtype=np.float64)

    @cached_property
    def records(self) -> tuple[str, ...]:
        """The id of each record of the training data, in the order of the documents."""
        return tuple(dict.fromkeys(self._record_of))

    @cached_property
    def _record_of(self) -> tuple[str, ...]:
        return tuple(record_of(self.of_run.examples.sample_id(i)) for i in range(len(self.of_run.examples)))

    def _kept(self, left_out: Collection[str]) -> NDArray[np.bool_]:
        without = set(left_out)
        if unknown := without - set(self.records):
            raise DataError(f"{min(unknown)} is not a record of the training data")
        return np.array([record not in without for record in self._record_of], dtype=np.bool_)

    def _path(self, left_out: Collection[str]) -> Path:
        return self.folder / f"{xxhash.xxh3_64_hexdigest(json.dumps(sorted(left_out)).encode())}.json"

    def _job(self, output: Path) -> Job:
        """Return the run's job in another folder, without what does not train: evaluation, observers, statistics."""
        job = self.of_run.job
        checkpoint = replace(job.train.checkpoint, keep=1, best=False, force=False, resume="auto")
        return replace(
            job,
            output=str(output),
            techniques=tuple(t for t in job.techniques if t.stage != Stage.OBSERVE),
            train=replace(job.train, evaluate=Evaluate(), checkpoint=checkpoint),
            statistics=replace(job.statistics, tokens=0),
            written="",
        )

    def _about(self) -> dict[str, Any]:
        job, folder = self._job(Path()), self.of_run.run.plan.folder
        settings = (job.model, job.techniques, replace(job.train, log_every=1), job.objective, job.mesh, job.seed)
        asked = [[name, one.ids.tolist(), one.mask.tolist()] for name, one in self.queries.items()]
        return {
            "format": FORMAT,
            "run": xxhash.xxh3_128_hexdigest(repr((settings, job.data.max_length, job.data.shuffle)).encode()),
            "base model": None if folder is None or job.model.initialise else fingerprint(folder),
            "training data": self.of_run.examples.digest,
            "queries": xxhash.xxh3_128_hexdigest(json.dumps(asked).encode()),
        }


def query_losses(run: Run, queries: Mapping[str, Document]) -> list[float]:
    """Return the mean loss per trained token of each query."""
    run.model.eval()
    losses = []
    for document in queries.values():
        batch = collate([document], max(1, int(document.mask.sum())), run.plan.device, packing_of(run))
        (ready,) = run.ready([batch])
        losses.append(float(run.scores(ready)["loss"]))
    return losses


def seconds_of(job: Job) -> float | None:
    """Return how long the steps of a run took by its log; None if it has none."""
    path = Path(job.output) / "metrics.jsonl"
    if not path.is_file():
        return None
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    speeds = [(line["tokens"], line["tokens_per_second"]) for line in lines if line.get("tokens_per_second")]
    return sum(tokens / speed for tokens, speed in speeds) or None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; remove it, and run the command again") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{path} is of another version, or damaged; give another --to")
    return values
