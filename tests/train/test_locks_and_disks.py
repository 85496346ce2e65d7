"""Two runs on one folder, and disks that are full, small, or no place to write."""

import json
import os
import resource
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest

import treering as tr
from tests.ranks import _context
from tests.toy_run import job
from tests.train.test_faults import at, saved
from treering.train import train
from treering.train.callbacks import Callback
from treering.train.config import Checkpoint
from treering.train.ranks import lock


def test_a_second_run_in_one_folder_is_refused_while_the_first_goes_on(tmp_path):
    refused = []

    class Second(Callback):
        def stepped(self, metrics):
            if metrics["step"] == 2:
                with pytest.raises(tr.CheckpointError, match=rf"process {os.getpid()} on {socket.gethostname()}") as it:
                    train(job(tmp_path))
                refused.append(str(it.value))

    train(job(tmp_path), [Second()])
    assert "run.lock" in refused[0] and not (tmp_path / "run" / "run.lock").exists()


MINE = {"host": socket.gethostname(), **lock.whoami(os.getpid())}


@pytest.mark.parametrize("change", [{"pid": 2**22 + 1}, {"boot": "another"}, {"started": 1}])
def test_a_lock_of_a_dead_process_is_taken_over(tmp_path, change):
    path = tmp_path / lock.NAME
    path.write_text(json.dumps(MINE | change))
    with lock.locked(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


class Elsewhere(lock.Clock):
    """Time that goes on only while somebody waits. Another host touches the lock after each of `touches` seconds."""

    def __init__(self, path, touches=()):
        self.now, self.touched, self.path, self.touches = 0.0, 0.0, path, list(touches)

    def age(self, path):
        assert path == self.path
        return self.now - self.touched

    def sleep(self, seconds):
        self.now += seconds
        while self.touches and self.now >= self.touches[0]:
            self.touched = self.touches.pop(0)
            os.utime(self.path, (0, 1e9 + self.touched))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "1"}', json.dumps(MINE | {"host": "elsewhere"})])
def test_a_lock_of_another_host_counts_while_it_is_touched(tmp_path, content):
    path = tmp_path / lock.NAME
    path.write_text(content)
    living = Elsewhere(path, touches=[lock.STALE - 2])
    held = pytest.raises(tr.CheckpointError, match=r"elsewhere|an unknown host")
    with held, lock.locked(tmp_path, living):
        pass
    assert lock.STALE - 2 <= living.now <= lock.STALE
    dead = Elsewhere(path)  # nobody touches it any more
    with lock.locked(tmp_path, dead):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert lock.STALE <= dead.now < lock.STALE + 2


def test_the_age_of_a_lock_is_by_the_clock_of_its_file_system(tmp_path):
    path = tmp_path / lock.NAME
    path.write_text("")
    written = path.stat().st_mtime
    os.utime(path, (written - 3600, written - 3600))
    assert lock.CLOCK.age(path) >= 3600 and os.listdir(tmp_path) == [lock.NAME]


def limited_at_4():
    """From step 4 on no file of this process may grow beyond 20 KB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    at(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)))


def _limited(pipe, root, on_error):
    import torch

    torch.set_num_threads(1)
    limited_at_4()
    checkpoint = Checkpoint(every=3, keep=20, on_error=on_error)
    try:
        train(job(root, train={"checkpoint": checkpoint}))
        pipe.send("done")
    except tr.CheckpointError as error:
        pipe.send(str(error))


@pytest.mark.parametrize("on_error", ["stop", "warn"])
def test_a_save_that_does_not_fit_leaves_the_one_before_and_says_where_and_how_much(tmp_path, on_error):
    job(tmp_path)
    here, there = _context.Pipe(duplex=False)
    process = _context.Process(target=_limited, args=(there, tmp_path, on_error), daemon=True)
    process.start()
    there.close()
    message = here.recv()
    process.join()
    assert saved(tmp_path) == ["step-3"]
    assert "File too large" in message and "checkpoints/step-" in message and "MiB to" in message and "free" in message
    assert ("step-12" in message) == (on_error == "warn")  # the last one must succeed
    notes = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert notes.count("training continues without it") == (2 if on_error == "warn" else 0)
    train(job(tmp_path))
    assert "step-12" in saved(tmp_path)


def test_an_output_that_cannot_be_a_folder_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(tr.CheckpointError, match="file"):
        train(job(tmp_path, "file"))
    with pytest.raises(tr.CheckpointError, match="file/deeper"):
        train(job(tmp_path, "file/deeper"))
    assert (tmp_path / "file").read_text() == ""
    with pytest.raises(tr.CheckpointError, match="proc"):
        train(replace(job(tmp_path), output="/proc/nowhere"))
    assert Path("/proc").is_dir()
