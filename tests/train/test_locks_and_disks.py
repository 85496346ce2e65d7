"""Two runs on one folder, and disks that are full, small, or no place to write."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import treering as tr
from tests import namespaces
from tests.ranks import _context, on_ranks
from tests.toy_run import job
from tests.train.test_faults import at, saved
from treering.train import train
from treering.train.callbacks import Callback, JsonLines
from treering.train.config import Checkpoint
from treering.train.ranks import heartbeat, lock


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


@pytest.mark.parametrize("change", [{"pid": 2**22 + 1}, {"started": 1}])
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


BEFORE = {key: value for key, value in MINE.items() if key != "namespace"}  # as earlier versions wrote it
UNSEEN = [MINE | change for change in ({"host": "elsewhere"}, {"boot": "another"}, {"namespace": 1})]
CONTENTS = ["", "{", "[]", '{"pid": "1"}', *map(json.dumps, [BEFORE, *UNSEEN])]


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_a_lock_of_a_process_that_cannot_be_seen_counts_while_it_is_touched(tmp_path, content):
    path = tmp_path / lock.NAME
    path.write_text(content)
    living = Elsewhere(path, touches=[lock.STALE - 2])
    held = pytest.raises(tr.CheckpointError, match=rf"elsewhere|an unknown host|{socket.gethostname()}")
    with held, lock.locked(tmp_path, living):
        pass
    assert lock.STALE - 2 <= living.now <= lock.STALE
    dead = Elsewhere(path)  # nobody touches it any more
    with lock.locked(tmp_path, dead):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert lock.STALE <= dead.now < lock.STALE + 2


LOCKED = """
import sys
from pathlib import Path
from treering.train.ranks import lock
lock.BEAT = 0.2
with lock.locked(Path(sys.argv[1])):
    print(1, flush=True)
    sys.stdin.read()
"""


def test_a_run_in_another_pid_namespace_keeps_its_lock_until_nobody_touches_it(tmp_path):
    words = (sys.executable, "-c", LOCKED, tmp_path)
    with namespaces.started(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        holder = json.loads((tmp_path / lock.NAME).read_text())
        assert holder["host"] == socket.gethostname() and holder["boot"] == MINE["boot"]
        with pytest.raises(tr.CheckpointError, match="in use by another run"), lock.locked(tmp_path):
            pass
        namespaces.kill(other)
    with lock.locked(tmp_path, Elsewhere(tmp_path / lock.NAME)):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


WHO = """
import json, os, sys
from treering.train.ranks.lock import whoami
print(json.dumps(whoami(os.getpid())), flush=True)
sys.stdin.read()
"""


def test_a_rank_in_another_pid_namespace_is_not_taken_for_dead(tmp_path):
    words = (sys.executable, "-c", WHO)
    with namespaces.started(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        entry = {"host": socket.gethostname(), **json.loads(other.stdout.readline())}
        assert not heartbeat.dead(entry)
        other.stdin.close()
    assert heartbeat.dead(entry | {"namespace": MINE["namespace"]}) and not heartbeat.dead(MINE)


def test_a_lock_dated_in_the_future_is_waited_for_as_long_as_any_other_and_not_in_silence(tmp_path, caplog):
    path = tmp_path / lock.NAME
    path.write_text(json.dumps(UNSEEN[0]))
    dead = Elsewhere(path)
    dead.touched = 86_400.0
    with lock.locked(tmp_path, dead):
        pass
    assert lock.STALE <= dead.now < lock.STALE + 2
    assert "86,400 s in the future" in caplog.text and "waiting up to 60 s" in caplog.text
    path.write_text(json.dumps(UNSEEN[0]))
    living = Elsewhere(path, touches=[5.0])
    living.touched = 86_400.0
    with pytest.raises(tr.CheckpointError, match="in use by another run"), lock.locked(tmp_path, living):
        pass


def test_a_lock_that_does_not_fit_on_the_disk_is_not_left_empty(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock.os, "fdopen", full)
    with pytest.raises(tr.CheckpointError, match=r"run\.lock cannot be made: No space left"), lock.locked(tmp_path):
        pass
    assert not os.listdir(tmp_path)


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


def prepared_with_files_of_at_most(folder, size):
    import torch

    from treering.plan.prepared import Prepared

    store = Prepared(folder)
    store.bytes = 3 << 20
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    store.write("0" * 32, {"a": torch.ones(size // 8)})
    try:
        store.write("1" * 32, {"a": torch.ones(1 << 18)})
    except tr.CheckpointError as error:
        return str(error)


def test_a_disk_that_fills_with_prepared_results_is_an_error_with_path_and_need(tmp_path):
    (message,) = on_ranks(1, prepared_with_files_of_at_most, tmp_path, 500_000)
    assert f"{tmp_path}/{'1' * 32}.safetensors cannot be written: File too large" in message
    assert (
        "it needs 1.0 MiB, all results of the run together 3.0 MiB, and" in message and "MiB are free there" in message
    )
    assert os.listdir(tmp_path) == [f"{'0' * 32}.safetensors"]


def metrics_in_files_of_at_most(path, size):
    lines = JsonLines(path)
    lines.started(3, {})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        lines.stepped({"step": 1, "loss": 2.0})
    except tr.CheckpointError as error:
        return str(error)


def test_a_line_of_metrics_that_does_not_fit_is_not_left_by_half(tmp_path):
    path = tmp_path / "metrics.jsonl"
    (message,) = on_ranks(1, metrics_in_files_of_at_most, path, 60)
    assert message == f"{path} cannot be written: File too large"
    JsonLines(path).stepped({"step": 1, "loss": 2.0})
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["start", "step"]


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
