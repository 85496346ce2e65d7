"""Encodes batches of records, in this process or in workers, and yields results in the order of the data."""

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
from treering.data.encode import Encoded, Encoder, PreparedTexts
from treering.data.encoding_recipe import Recipe
from treering.data.formats import Sample, parse
from treering.data.sources.records import Record, SampleError

_CHARACTERS = 4 << 20  # of one batch
_RECORDS, _WORKER_RECORDS = 512, 512  # of one batch: enough to keep the tokenizer's threads, or all workers, busy
STOP_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}  # as in train/signals.py
Result = list[Encoded] | SampleError


@dataclass(frozen=True, kw_only=True)
class EncodingJob:
    """What a worker needs to encode records."""

    plan: Recipe
    format: Format
    config: Data


def encoded(records: Iterator[Record], job: EncodingJob, workers: int) -> Iterator[Result]:
    """Yield, for each record in order, its documents or its error."""
    if workers == 1:
        yield from _in_process(records, job)
        return
    # Not fork: a fork after torch or rayon have started threads can deadlock.
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, (job,)) as pool:
        waiting: deque[Future[list[Result]]] = deque()
        try:
            for batch in batches(records, _WORKER_RECORDS):
                with _signals_blocked():  # workers are started in here, and inherit the mask
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


def batches(records: Iterator[Record], most: int) -> Iterator[list[Record]]:
    """Yield the records in lists of `most`, or fewer where they are long."""
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
    """Return a cheap estimate of the number of characters in a record."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 1


def _in_process(records: Iterator[Record], job: EncodingJob) -> Iterator[Result]:
    """Encode in this process; the tokenizer works on a batch while Python renders the next one."""
    encoder = Encoder(job.plan)
    before: tuple[list[Result], PreparedTexts, Future[list[Encoding]]] | None = None
    with ThreadPoolExecutor(1, "treering-tokenise") as pool:
        for batch in batches(records, _RECORDS):
            results, samples = _parse(batch, job)
            prepared = encoder.prepare(samples)
            encodings = pool.submit(encoder.tokenise, prepared)
            if before is not None:
                yield from _merge(before[0], encoder.finish(before[1], before[2].result()))
            before = (results, prepared, encodings)
        if before is not None:
            yield from _merge(before[0], encoder.finish(before[1], before[2].result()))


def _parse(batch: list[Record], job: EncodingJob) -> tuple[list[Result], list[Sample]]:
    """Return the samples of a batch, and a list with an error for each bad record and an empty list for each sample."""
    results: list[Result] = []
    samples: list[Sample] = []
    for record in batch:
        try:
            samples.append(parse(record, job.format, job.config))
            results.append([])
        except SampleError as error:
            results.append(error)
    return results, samples


def _merge(results: list[Result], encoded: list[Result]) -> Iterator[Result]:
    """Yield the errors of `results`, and the encoded samples in place of its empty lists."""
    samples = iter(encoded)
    for result in results:
        yield result if isinstance(result, SampleError) else next(samples)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_signals() -> None:
    """Block the signals that ask a run to stop. Schedulers send them to all processes; only the run ends workers.

    A worker ends when the run sends SIGTERM, or when the run no longer exists.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    run = os.getppid()

    def wait() -> None:
        while os.getppid() == run:
            received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
            if received is not None and received.si_pid == run:
                break
        os._exit(0)

    threading.Thread(target=wait, name="treering-worker", daemon=True).start()


_encoder: tuple[EncodingJob, Encoder] | None = None  # of this worker process, used for all batches


def _start(job: EncodingJob) -> None:
    global _encoder
    _outlive_signals()
    _encoder = (job, Encoder(job.plan))


def _run(batch: list[Record]) -> list[Result]:
    assert _encoder is not None
    job, encoder = _encoder
    results, samples = _parse(batch, job)
    return list(_merge(results, encoder.encode(samples)))
