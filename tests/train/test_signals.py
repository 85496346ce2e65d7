"""SIGTERM, SIGUSR1 and Ctrl-C: one checkpoint, and the program's own handlers afterwards."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import pytest

import treering as tr
from tests.ranks import PATIENCE, _context
from tests.toy_run import job
from tests.train.test_faults import ALL, me, saved
from treering.data.work import _outlive_signals, _signals_blocked
from treering.train import train
from treering.train.callbacks import Callback
from treering.train.config import Evaluate
from treering.train.ranks import lock
from treering.train.ranks import signals as of_ranks
from treering.train.ranks.signals import Signals


class SignalAt(Callback):
    def __init__(self, step, number):
        self.step, self.number = step, number

    def stepped(self, metrics):
        if metrics["step"] == self.step:
            me(self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_each_signal_ends_a_run_with_a_checkpoint_and_handlers_come_back(tmp_path, number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with pytest.raises(tr.Interrupted, match=f"stopped by {number.name}: saved step 3"):
        train(job(tmp_path, train=ALL), [SignalAt(3, number)])
    assert saved(tmp_path) == ["step-3"]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_an_evaluation_that_is_cut_short_is_made_when_the_run_goes_on(tmp_path):
    class InEvaluation(Callback):
        def stepped(self, metrics):
            if metrics["step"] == 4:
                me(signal.SIGTERM)

    settings = ALL | {"evaluate": Evaluate(every=4)}
    with pytest.raises(tr.Interrupted):
        train(job(tmp_path, data={"eval_fraction": 0.2}, train=settings), [InEvaluation()])
    train(job(tmp_path, data={"eval_fraction": 0.2}, train=settings))
    train(job(tmp_path, "whole", data={"eval_fraction": 0.2}, train=settings))

    def judged(output):
        lines = map(json.loads, (tmp_path / output / "metrics.jsonl").read_text().splitlines())
        return [(m["step"], m["held_out_loss"]) for m in lines if m["kind"] == "evaluation"]

    assert judged("run") == judged("whole") and len(judged("run")) == 3


def test_a_signal_before_the_first_step_ends_the_run_where_it_stands(tmp_path, monkeypatch):
    import treering.train.run as loop

    monkeypatch.setattr(loop, "open_data", lambda *_: me(signal.SIGTERM))
    with pytest.raises(tr.Interrupted, match="nothing to save"):
        train(job(tmp_path))
    assert not (tmp_path / "run" / lock.NAME).exists()


def _stuck_in_c():
    with Signals() as signals:
        signals.at_once = False
        import ctypes

        threading.Timer(0.3, me, [signal.SIGTERM]).start()
        threading.Timer(0.6, me, [signal.SIGTERM]).start()
        mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)  # for ever, and no signal interrupts it


def test_a_second_signal_ends_a_process_that_does_not_come_back_to_python():
    process = _context.Process(target=_stuck_in_c, daemon=True)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 128 + signal.SIGTERM


def test_a_rank_whose_launcher_is_gone_before_it_begins_ends_without_a_step(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(of_ranks.LAUNCHER, "1")  # so it was another process, and is not the parent any more
    with pytest.raises(tr.Interrupted, match="its launcher is gone: there was nothing to save yet"), Signals():
        time.sleep(PATIENCE)


class Orphaned(Callback):
    """From the end of step 3 on the process has another parent."""

    def stepped(self, metrics):
        if metrics["step"] == 3:
            os.getppid = lambda: 1
            until = time.monotonic() + PATIENCE
            while _looks() and time.monotonic() < until:
                time.sleep(0.01)


def _looks():
    return any(thread.name == "treering-launcher" for thread in threading.enumerate())


@pytest.mark.parametrize("by", [of_ranks.LAUNCHER, "TORCHELASTIC_RUN_ID"])
def test_a_rank_whose_launcher_is_killed_saves_and_stops_and_the_run_goes_on(tmp_path, monkeypatch, by):
    plain = os.getppid
    monkeypatch.setattr(os, "getppid", plain)  # restores it
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "1")
        patch.setenv(by, str(plain()))
        with pytest.raises(tr.Interrupted, match="stopped because its launcher is gone: saved step 3"):
            train(job(tmp_path, train=ALL), [Orphaned()])
    assert saved(tmp_path) == ["step-3"] and not _looks()
    os.getppid = plain
    train(job(tmp_path, train=ALL))
    assert saved(tmp_path) == ["step-12", "step-3"]


def _orphan_stuck_in_c():
    os.environ.update({"RANK": "0", of_ranks.LAUNCHER: "1"})
    with Signals():
        import ctypes

        mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)


def test_an_orphan_that_does_not_come_back_to_python_before_its_first_step_is_ended():
    process = _context.Process(target=_orphan_stuck_in_c, daemon=True)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == tr.Interrupted.exit_code


def test_a_signal_in_a_thread_of_a_program_leaves_its_handlers_alone(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    found = []
    thread = threading.Thread(target=lambda: found.append((train(job(tmp_path)), signal.getsignal(signal.SIGTERM))))
    thread.start()
    thread.join()
    assert found[0][0]["steps"] == 12 and found[0][1] is before


def _pid():
    return os.getpid()


def test_a_signal_to_the_whole_job_does_not_end_its_data_workers():
    with ProcessPoolExecutor(1, get_context("spawn"), _outlive_signals) as pool:
        with _signals_blocked():
            born = pool.submit(_pid)
        worker = born.result()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            subprocess.run(["kill", f"-{number}", str(worker)], check=True)
        time.sleep(0.2)
        assert pool.submit(_pid).result() == worker
        os.kill(worker, signal.SIGTERM)  # from the process that it works for
        with pytest.raises(BrokenProcessPool):
            pool.submit(time.sleep, PATIENCE).result()


def started(root, output, *settings):
    file = root / f"{output}.yaml"
    made = job(root, output)
    file.write_text(
        f"model: {made.model.path}\ndata: {{train: {made.data.train}, max_length: 128, cache: {made.data.cache}}}\n"
        f"techniques: {{full: , shard: }}\noutput: {made.output}\n"
        "train: {tokens_per_step: 256, steps: 5000, checkpoint: {every: 5000}}\n"
    )
    words = [sys.executable, "-m", "treering", "train", str(file), "--nproc", "2"]
    words += [word for setting in settings for word in ("--set", setting)]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)


def test_a_launcher_that_is_told_to_stop_waits_for_the_checkpoint_and_another_job_goes_on(tmp_path):
    stopped, other = started(tmp_path, "stopped"), started(tmp_path, "other", "train.steps=3")
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    until = time.monotonic() + PATIENCE
    while not (metrics.exists() and '"kind": "step"' in metrics.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    _, said = stopped.communicate(timeout=PATIENCE)
    assert stopped.returncode == 7 and "stopped by SIGTERM: saved step" in said, said
    _, said = other.communicate(timeout=PATIENCE)
    assert other.returncode == 0, said
    (kept,) = saved(tmp_path, "stopped")
    assert kept != "step-5000" and saved(tmp_path, "other") == ["step-3"]
