"""The rank of this process, from the environment that torchrun or srun leave."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treering.cli import launch
from treering.cli.launch import Ranks, first_host, forgotten_srun, ranks_from, set_environment
from treering.cli.train import _start_ranks
from treering.core.errors import ConfigError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
BATCH_SCRIPT = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def test_without_a_launcher_there_are_no_ranks():
    assert ranks_from({}) is None
    assert ranks_from({"LOCAL_RANK": "0"}) is None


def test_torchrun_is_joined_as_it_says():
    ranks = ranks_from(TORCHRUN)
    assert ranks == Ranks(rank=3, world=8, local_rank=1, address="10.0.0.1", port=29500, by="torchrun")


def test_srun_is_joined_at_the_first_host():
    ranks = ranks_from(SRUN)
    assert ranks == Ranks(rank=9, world=16, local_rank=1, address="node01", port=15000 + 4711, by="srun")
    assert ranks_from(SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}).port == 1234


def test_all_tasks_of_a_job_come_to_the_same_meeting_point():
    seen = {(r.address, r.port) for i in range(16) if (r := ranks_from(SRUN | {"SLURM_PROCID": str(i)}))}
    assert len(seen) == 1


def test_a_task_that_sees_one_gpu_uses_it_as_its_first():
    assert ranks_from(SRUN | {"CUDA_VISIBLE_DEVICES": "5"}).local_rank == 0
    assert ranks_from(SRUN | {"CUDA_VISIBLE_DEVICES": "4,5"}).local_rank == 1


def test_a_batch_script_is_not_a_rank():
    assert ranks_from(BATCH_SCRIPT) is None
    assert forgotten_srun(BATCH_SCRIPT) == 16
    assert forgotten_srun(SRUN) is None
    assert forgotten_srun({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}) is None
    assert forgotten_srun({"SLURM_NTASKS": "4"}) is None


def test_one_task_needs_no_partners():
    assert ranks_from(SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        (TORCHRUN | {"MASTER_PORT": ""}, "MASTER_PORT"),
        (TORCHRUN | {"RANK": "x"}, "must be a whole number"),
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8"),
        (TORCHRUN | {"RANK": "-1"}, "must be a whole number"),
        (SRUN | {"SLURM_STEP_NODELIST": "[", "SLURM_NODELIST": ""}, "no host"),
    ],
)
def test_half_an_environment_is_refused_by_name(environ, says):
    with pytest.raises(ConfigError, match=says):
        ranks_from(environ)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node01", "node01"),
        ("node[01-04,7]", "node01"),
        ("node[7,1-3],login", "node7"),
        ("a,b[1-2]", "a"),
        ("rack[1-2]n[03-04].local,x", "rack1n03.local"),
        (" gpu-a[12] ", "gpu-a12"),
    ],
)
def test_the_first_host_of_a_compressed_list(nodes, host):
    assert first_host(nodes) == host


@given(st.text(alphabet="ab[]-,0123 .;$(", max_size=30))
def test_any_list_gives_a_plain_host_or_is_refused(nodes):
    try:
        host = first_host(nodes)
    except ConfigError:
        return
    assert host
    assert not set(host) & set("[], ;$(")


def test_ranks_are_said_the_way_torch_reads_them():
    environ: dict[str, str] = {}
    ranks = ranks_from(SRUN)
    set_environment(ranks, environ)
    again = ranks_from(environ)
    assert (again.rank, again.world, again.local_rank, again.address) == (9, 16, 1, "node01")


@pytest.mark.parametrize(("seconds", "notice"), [(launch.SAVING, False), (launch.SAVING_2_11, True)])
def test_a_torch_that_cannot_wait_for_a_checkpoint_is_reported(monkeypatch, capsys, tmp_path, seconds, notice):
    monkeypatch.setattr(launch, "saving_time", lambda: seconds)
    monkeypatch.setattr(launch, "start", lambda nproc, arguments, logs: None)
    _start_ranks(SimpleNamespace(output=str(tmp_path)), 2, [])
    assert ("kills ranks that need more than 30 s" in capsys.readouterr().out) == notice
