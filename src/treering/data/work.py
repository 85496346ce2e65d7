"""Encoding batches of records, here or in worker processes, always in the order of the data."""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

from tokenizers import Encoding

from treering.core.errors import DataError
from treering.data.config import Data, Format
from treering.data.encode import Encoded, Encoder, Prepared, Recipe
from treering.data.formats import Sample, parse
from treering.data.sources.records import Record, SampleError

_CHARACTERS = 4 << 20  # of one batch, and how many records:
_HERE, _APART = 512, 512  # enough to keep the tokenizer's threads, or all processes, busy
ASKING = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}  # as in train/signals.py
Result = list[Encoded] | SampleError


@dataclass(frozen=True, kw_only=True)
class Job:
    plan: Recipe
    format: Format
    config: Data


def encoded(records: Iterator[Record], job: Job, workers: int) -> Iterator[Result]:
    """For each record, in order, its documents or the error that it is."""
    if workers == 1:
        yield from _here(records, job)
        return
    # Not fork: a fork after torch or rayon have started threads can deadlock.
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, (job,)) as pool:
        waiting: deque[Future[list[Result]]] = deque()
        try:
            for batch in _batches(records, _APART):
                with _signals_held():  # a worker is born in here, and inherits what is held
                    waiting.append(pool.submit(_run, batch))
                if len(waiting) > 2 * workers:  # bounds memory: reading is faster than encoding
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(f"a tokenising process died (out of memory?); try data.workers: 1: {error}") from error
        finally:
            for future in waiting:
                future.cancel()


def _batches(records: Iterator[Record], most: int) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += _size(record.value)
        if len(batch) == most or size > _CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(value: object) -> int:
    """A cheap measure of how much text a record holds."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 1


def _here(records: Iterator[Record], job: Job) -> Iterator[Result]:
    """In this process; the tokenizer works on a batch while Python renders the next one."""
    encoder = Encoder(job.plan)
    before: tuple[list[Result], Prepared, Future[list[Encoding]]] | None = None
    with ThreadPoolExecutor(1, "treering-tokenise") as pool:
        for batch in _batches(records, _HERE):
            results, samples = _parse(batch, job)
            prepared = encoder.prepare(samples)
            ahead = pool.submit(encoder.tokenise, prepared)
            if before is not None:
                yield from _merge(before[0], encoder.finish(before[1], before[2].result()))
            before = (results, prepared, ahead)
        if before is not None:
            yield from _merge(before[0], encoder.finish(before[1], before[2].result()))


def _parse(batch: list[Record], job: Job) -> tuple[list[Result], list[Sample]]:
    """Errors in their places with empty lists between them, and the samples that belong there."""
    results: list[Result] = []
    samples: list[Sample] = []
    for record in batch:
        try:
            samples.append(parse(record, job.format, job.config))
            results.append([])
        except SampleError as error:
            results.append(error)
    return results, samples


def _merge(results: list[Result], found: list[Result]) -> Iterator[Result]:
    rest = iter(found)
    for result in results:
        yield result if isinstance(result, SampleError) else next(rest)


@contextmanager
def _signals_held() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_signals() -> None:
    """A signal to the whole job asks the run to stop, not its workers to die under it: only the run may end them.

    They also end when it is gone; nobody else would ever tell them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    run = os.getppid()

    def wait() -> None:
        while os.getppid() == run:
            told = signal.sigtimedwait({signal.SIGTERM}, 1.0)
            if told is not None and told.si_pid == run:
                break
        os._exit(0)

    threading.Thread(target=wait, name="treering-worker", daemon=True).start()


_encoder: tuple[Job, Encoder] | None = None  # one a worker process: made once, used for every batch


def _start(job: Job) -> None:
    global _encoder
    _outlive_signals()
    _encoder = (job, Encoder(job.plan))


def _run(batch: list[Record]) -> list[Result]:
    assert _encoder is not None
    job, encoder = _encoder
    results, samples = _parse(batch, job)
    return list(_merge(results, encoder.encode(samples)))
