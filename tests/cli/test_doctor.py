"""Each check of the doctor finds what it is for, and two ranks really talk."""

import resource
import sys

import pytest

from tests.ranks import PATIENCE
from treering.cli import doctor
from treering.cli.env import Finding
from treering.cli.ranks_probe import two_ranks


def test_missing_packages_are_bad(monkeypatch):
    installed = doctor.versions()
    monkeypatch.setattr(doctor, "versions", lambda: installed | {"xxhash": "not installed"})
    finding = doctor.packages()
    assert (finding.status, finding.result) == ("bad", "xxhash not installed")


@pytest.mark.parametrize(("free", "status"), [(2**20, "bad"), (5 * 2**30, "warn"), (100 * 2**30, "ok")])
def test_disk_space_is_judged(monkeypatch, tmp_path, free, status):
    monkeypatch.setattr(doctor, "free_space", lambda folder: free)
    assert doctor.disk(tmp_path).status == status


def test_disk_space_of_a_folder_that_is_yet_to_be_made(tmp_path):
    from treering.cli.env import free_space

    assert free_space(tmp_path / "a" / "b") > 0


def test_a_folder_that_cannot_be_written_is_bad(tmp_path):
    assert doctor.writable(tmp_path / "new").status == "ok"
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    assert doctor.writable(tmp_path / "file").status == "bad"


def test_limits_are_judged(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 1024))
    assert doctor.open_files().status == "warn"
    assert "at most 1024" in doctor.open_files().remedy
    assert doctor.file_size().status == "bad"
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert doctor.open_files().status == doctor.file_size().status == "ok"


def test_tokenizer_threads_and_clock(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert doctor.tokenizer_threads().status == "warn"
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    assert doctor.tokenizer_threads().status == "ok"
    monkeypatch.setattr(doctor.time, "time", lambda: 0.0)
    assert doctor.clock().status == "warn"


def test_an_allocator_that_cannot_grow_its_segments_is_a_warning_where_there_is_a_card(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert doctor.allocator().status == "ok"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert doctor.allocator().status == "warn" and "expandable_segments:True" in doctor.allocator().remedy
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64, expandable_segments:True")
    assert doctor.allocator().status == "ok"


def test_every_finding_that_is_not_ok_has_a_remedy(tmp_path):
    for finding in doctor.everything(tmp_path, ranks=False):
        assert finding.status == "ok" or finding.remedy, finding


def test_one_bad_finding_makes_the_whole_bad(capsys):
    good = Finding(name="a", status="ok", result="x")
    warn = Finding(name="b", status="warn", result="[y]", remedy="do z")
    bad = Finding(name="c", status="bad", result="\x1b[2J", remedy="fix")
    assert doctor.show([good, warn])
    assert not doctor.show([bad, good])
    text = capsys.readouterr().out
    assert "warn b: [y]\n     → do z\n" in text
    assert "bad  c: \\x1b[2J" in text


def test_two_ranks_that_do_not_answer_or_fail_are_bad():
    asleep = two_ranks(0.3, (sys.executable, "-c", "import time; time.sleep(100_000)"))
    assert (asleep.status, "no answer in 0 s") == ("bad", asleep.result)
    failing = two_ranks(PATIENCE, (sys.executable, "-c", "raise SystemExit('no network')"))
    assert failing.status == "bad"
    assert "no network" in failing.result


def test_two_real_ranks_add_their_numbers():
    assert two_ranks(PATIENCE).status == "ok"
