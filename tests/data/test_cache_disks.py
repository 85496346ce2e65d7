"""Token caches on full disks, and what killed tokenisers leave."""

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time

import pytest

import treering as tr
from tests import namespaces
from tests.ranks import PATIENCE, RankFailed, on_ranks
from tests.toy_run import chats, job
from treering.data import cache
from treering.data.examples import build
from treering.train.prepare import open_tokenizer


def built(root, folder, progress=None):
    """Tokenise the toy data into `folder`."""
    made = job(root, data={"cache": folder and str(folder)})
    return build(made.data, open_tokenizer(made), "train", progress)


def built_with_files_of_at_most(root, folder, size):
    tempfile.tempdir = str(root / "temporary")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        built(root, folder)
    except tr.DataError as error:
        return str(error)


@pytest.mark.parametrize(
    ("folder", "size", "documents"), [("tokens", 30_000, 512), ("tokens", 200_000, 800), (None, 30_000, 512)]
)
def test_a_disk_that_fills_while_tokenising_is_an_error_with_path_and_need(tmp_path, folder, size, documents):
    """The raw arrays do not fit, or the file in which they are joined does not."""
    job(tmp_path)
    (tmp_path / "chat.jsonl").unlink()
    chats(tmp_path / "chat.jsonl", 800)
    (tmp_path / "temporary").mkdir()
    (message,) = on_ranks(1, built_with_files_of_at_most, tmp_path, folder and tmp_path / folder, size)
    assert f"data.cache: {tmp_path / (folder or 'temporary')}" in message and "File too large" in message
    assert f"the {documents} documents so far need" in message and "MiB are free there" in message
    assert not any((tmp_path / (folder or "temporary")).iterdir())


def killed_while_tokenising(root, folder):
    tempfile.tempdir = str(root / "temporary")
    cache.CacheWriter.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    built(root, folder)


@pytest.mark.parametrize("folder", ["tokens", None])
def test_a_job_that_is_killed_while_tokenising_and_started_again_leaves_nothing(tmp_path, monkeypatch, folder):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    folder = folder and tmp_path / folder
    for _ in range(2):
        with pytest.raises(RankFailed, match="exit code -9"):
            on_ranks(1, killed_while_tokenising, tmp_path, folder)
        assert len(list((folder or tmp_path / "temporary").iterdir())) == 1
    examples = built(tmp_path, folder)
    assert len(list((folder or tmp_path / "temporary").iterdir())) == 1  # the tokens
    assert len(examples) == 40 and examples.document(0).ids.size
    del examples
    assert not any((tmp_path / "temporary").iterdir())


def test_a_cache_that_is_found_is_swept_around(tmp_path):
    built(tmp_path, tmp_path / "tokens")
    (tmp_path / "tokens" / f"a.tmp-{'0' * 32}").mkdir()
    built(tmp_path, tmp_path / "tokens")
    assert len(list((tmp_path / "tokens").iterdir())) == 1


HELD = """
import sys, tempfile
from pathlib import Path
from treering.data import cache
tempfile.tempdir = sys.argv[1]
private, writer = cache.PrivateFolder(), cache.CacheWriter(Path(sys.argv[1]) / "a")
print(private.path, writer._folder, flush=True)
sys.stdin.read()
"""


def test_what_a_process_of_another_pid_namespace_writes_stays_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    words = (sys.executable, "-c", HELD, tmp_path)
    with namespaces.started(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        theirs = sorted(other.stdout.readline().split())
        mine = cache.PrivateFolder()
        cache.sweep(tmp_path / "b")
        assert sorted(map(str, tmp_path.iterdir())) == sorted([*theirs, str(mine.path)])
        namespaces.kill(other)
    until = time.monotonic() + PATIENCE
    while len(list(tmp_path.iterdir())) > 1 and time.monotonic() < until:  # its locks end a moment after its output
        mine = cache.PrivateFolder()
        cache.sweep(tmp_path / "b")
    assert list(tmp_path.iterdir()) == [mine.path]


def test_without_locks_of_the_file_system_the_age_of_a_leftover_decides(tmp_path, monkeypatch):
    def without(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")  # as NFS has it, for a folder

    monkeypatch.setattr(fcntl, "flock", without)
    old, new = (tmp_path / f"{name}.tmp-{'0' * 32}" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir()
        (folder / "ids").write_bytes(b"1234")
        os.utime(folder, (0, 0))
    os.utime(old / "ids", (0, 0))
    cache.sweep(tmp_path / "b")
    assert list(tmp_path.iterdir()) == [new]


def test_a_damaged_cache_that_cannot_be_removed_is_an_error_of_the_cache(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    built(tmp_path, tmp_path / "tokens")
    (folder,) = (tmp_path / "tokens").iterdir()
    (folder / "tokens.safetensors").write_bytes(b"")
    monkeypatch.setattr(type(folder), "rename", refuse)
    with pytest.raises(tr.DataError, match="is damaged and cannot be removed: Permission denied"):
        built(tmp_path, tmp_path / "tokens")


def test_no_place_for_a_private_folder_is_an_error_of_the_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(tr.DataError, match=r"data\.cache is null, and no temporary folder can be made: No such file"):
        cache.PrivateFolder()
