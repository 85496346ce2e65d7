"""The proof at a fixed seed, small enough for every change; `python -m tests.chaos` is the large one."""

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.chaos import kills, ranks, sections, surroundings, toy
from tests.chaos.__main__ import HEAD, put
from tests.chaos.sections import QUICK
from treering.core.errors import CheckpointError

SEED = 0
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
PROVE = "tests.chaos --trials 300 --seed 0 --page docs/reliability.md"
TITLES = re.findall(r'row = Row\(what="([^"]+)"\)', Path(sections.__file__).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="module")
def proving(root):
    return kills.Proving(root)


def holds(row, least):
    assert not row.failures, f"seed {SEED}: " + "\n".join(row.failures)
    assert row.cases >= least


def test_a_killed_run_ends_bitwise_as_one_that_was_not(proving):
    holds(sections.kill_trials(proving, SEED, QUICK), QUICK.kills)


def test_every_fault_point_of_a_save_leaves_a_whole_checkpoint(root):
    holds(sections.fault_points(root, QUICK), 30)


def test_every_damage_is_refused_by_name(root):
    holds(sections.damaged_files(root, SEED, QUICK), 150)


def test_a_file_that_no_manifest_names_is_ignored(root):
    holds(sections.unknown_files(root), 1)


def test_a_run_refuses_damage_or_goes_on_from_an_older_checkpoint(proving):
    holds(sections.damaged_runs(proving, SEED, QUICK), QUICK.resumes)


def test_another_number_of_ranks_has_the_same_state(root):
    holds(sections.other_ranks(root, SEED, QUICK), QUICK.pairs)


def test_a_strange_configuration_is_refused_or_valid(root):
    holds(sections.strange_configurations(root, SEED, QUICK), QUICK.configurations)


def test_strange_data_is_refused_or_counted(root):
    holds(sections.strange_data(root, SEED, QUICK), QUICK.datasets)


def test_a_run_in_another_container_keeps_its_folder_and_a_paused_rank_its_run(proving):
    row = sections.containers(proving)
    if not row.cases:
        pytest.skip(f"PID namespaces: {row.note}")
    holds(row, 3)


def test_a_full_disk_is_an_error_with_its_path_at_every_phase(proving):
    holds(sections.full_disks(proving, SEED, QUICK), len(surroundings.PHASES))


def test_a_killed_tokeniser_leaves_nothing_for_ever(root):
    holds(sections.killed_tokenisers(root, SEED, QUICK), QUICK.tokenisers)


def test_the_ranks_of_a_killed_launcher_save_and_stop(root):
    holds(sections.killed_launchers(root, SEED, QUICK), QUICK.launchers)


def test_the_page_has_a_whole_row_of_every_part(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    lines = text[text.index(HEAD) :].partition("\n\n")[0].splitlines()[2:]
    rows = [line.strip("|").split(" | ") for line in lines]
    assert [row[0].strip() for row in rows] == TITLES and all(len(row) == 5 for row in rows), "run: python -m " + PROVE
    assert all(row[1] == row[2] for row in rows)
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    put([sections.Row(what="a part", cases=2, note="note")], page)
    after = page.read_text(encoding="utf-8")
    assert "|---|---|---|---|---|\n| a part | 2 | 2 | note | 0 |\n\nMeasured" in after and TITLES[0] not in after


# The proof can fail: what it is made of sees a wrong bit, a torn save, an error, a kill.


def test_one_wrong_bit_or_loss_is_seen(proving):
    kind = toy.Kind(ranks=1)
    whole = proving.whole(kind)
    shutil.copytree(proving.root / kind.whole, proving.root / "other")
    proving.check_end(kind, "other")
    later = {**whole.steps[8].tensors, "lm_head.weight": whole.steps[7].tensors["lm_head.weight"]}
    with pytest.raises(AssertionError, match=r"1 of \d+ tensors differ, as lm_head\.weight"):
        kills.compare(toy.Outcome(later, {}, {}), whole.steps[8], "the end")
    metrics = proving.root / "other" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"kind": "step", "step": 8, "loss": 1.0}\n')
    with pytest.raises(AssertionError, match="losses"):
        proving.check_end(kind, "other")


def test_a_checkpoint_that_a_kill_tore_would_be_seen(proving):
    kind = toy.Kind(ranks=1)
    shutil.copytree(proving.root / kind.whole, proving.root / "torn")
    with pytest.raises(AssertionError, match="there was more"):
        proving.check(kind, "torn", [kills.Died(where="", newest=9)])
    (proving.root / "torn" / "checkpoints" / "step-8" / "rank-00000.safetensors").write_bytes(b"")
    with pytest.raises(AssertionError, match="had to be passed over"):
        proving.check(kind, "torn", [])


def fails():
    raise CheckpointError("as it should")


def dies_or_waits():
    if os.environ["RANK"] == "0":
        os.kill(os.getpid(), 9)
    import torch.distributed as dist

    dist.barrier()


def test_an_error_of_a_rank_is_told_apart_from_a_kill():
    with pytest.raises(ranks.Ended, match="CheckpointError: as it should"):
        ranks.run(2, fails)
    began = ranks.start(2, dies_or_waits)
    began.met()
    assert not began.join()
    assert all(process.exitcode is not None for process in began.processes)
