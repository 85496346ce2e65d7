"""What ends a run on the way: signals, ranks that die or stop or go astray, disks, and other runs."""

import os
import signal
import tempfile
import time
from datetime import timedelta

import treering as tr
from tests.ranks import PATIENCE, _context
from tests.same import assert_all_same
from tests.toy_run import job
from treering.train import optimizers, train
from treering.train.checkpoints.files import read
from treering.train.config import Checkpoint
from treering.train.ranks.heartbeat import Board

ALL = {"checkpoint": Checkpoint(every=100, keep=20)}


def saved(root, output="run"):
    folder = root / output / "checkpoints"
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def tensors(root, output="run", step=12):
    return {n: t.read() for n, t in read(root / output / "checkpoints" / f"step-{step}").tensors.items()}


def at(step, act):
    """Do `act` as soon as this process begins `step`."""
    plain, seen = optimizers.set_rate, []

    def set_rate(*arguments):
        plain(*arguments)
        seen.append(1)
        if len(seen) == step:
            act()

    optimizers.set_rate = set_rate


def _rank(pipe, rank, world, store, root, act, timeout):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.dup2(os.open(root / f"rank-{rank}.err", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE)
    )
    if act is not None:
        act(rank)
    began = time.monotonic()
    try:
        train(job(root, techniques=(tr.Full(), tr.Shard()), train=ALL | {"timeout": timeout}))
        pipe.send((0, "", time.monotonic() - began))
    except tr.TreeringError as error:
        pipe.send((error.exit_code, f"{type(error).__name__}: {error}", time.monotonic() - began))
    except ValueError as error:
        pipe.send((1, str(error), time.monotonic() - began))
    os._exit(0)


class Ranks:
    """Real processes that train; each leaves (exit code, message, seconds) or is found to have ended otherwise.

    With the default `timeout` a rank waits for another for longer than anybody waits for it here: what ends has not
    ended by its timeout.
    """

    def __init__(self, root, act=None, world=2, timeout=100 * PATIENCE):
        job(root)  # the toy folder, which they share
        store = tempfile.mktemp(dir=root)
        self.root = root
        self.pipes, self.processes = [], []
        for rank in range(world):
            here, there = _context.Pipe(duplex=False)
            arguments = (there, rank, world, store, root, act, timeout)
            self.processes.append(_context.Process(target=_rank, args=arguments, daemon=True))
            self.processes[-1].start()
            there.close()
            self.pipes.append(here)

    def ends(self, rank):
        """A rank that could not be woken has left its message in its file of errors."""
        assert self.pipes[rank].poll(PATIENCE), f"rank {rank} goes on after {PATIENCE:.0f} s"
        try:
            return self.pipes[rank].recv()
        except EOFError:
            self.processes[rank].join()
            return self.processes[rank].exitcode, (self.root / f"rank-{rank}.err").read_text(), 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()


def me(number):
    os.kill(os.getpid(), number)


def term_at_5(rank):
    if rank == 1:
        at(5, lambda: me(signal.SIGTERM))


def test_a_signal_to_one_rank_saves_once_on_all_and_the_run_goes_on_bitwise(tmp_path):
    with Ranks(tmp_path, term_at_5) as ranks:
        for rank in range(2):
            code, message, _ = ranks.ends(rank)
            assert code == 7 and "saved step 5" in message
    assert saved(tmp_path) == ["step-5"]
    with Ranks(tmp_path) as ranks:
        assert [ranks.ends(rank)[0] for rank in range(2)] == [0, 0]
    cut = tensors(tmp_path)
    (tmp_path / "run").rename(tmp_path / "cut")
    with Ranks(tmp_path) as ranks:
        assert [ranks.ends(rank)[0] for rank in range(2)] == [0, 0]
    assert_all_same(cut, tensors(tmp_path))


def term_while_the_other_tokenises(rank):
    import treering.train.run as loop

    if rank == 0:
        loop.open_data = lambda *_: time.sleep(100 * PATIENCE)
        return
    plain, asked = Board.has, []

    def has(board, key):
        """The signal comes when this rank has begun to ask whether the other is done."""
        if key.startswith("first-"):
            asked.append(key)
            if len(asked) == 10:
                me(signal.SIGTERM)
        return plain(board, key)

    Board.has = has


def test_a_signal_to_a_rank_that_waits_for_data_ends_the_one_that_makes_it(tmp_path):
    with Ranks(tmp_path, term_while_the_other_tokenises) as ranks:
        assert ranks.ends(1)[:2] == (7, "Interrupted: stopped by SIGTERM: there was nothing to save yet")
        code, message, _ = ranks.ends(0)
        assert code == 7 and "rank 1 ended: stopped by SIGTERM; rank 0 was in preparing" in message


def killed_at_5(rank):
    if rank == 1:
        at(5, lambda: me(signal.SIGKILL))


def test_when_a_rank_is_killed_the_others_name_it_soon(tmp_path):
    with Ranks(tmp_path, killed_at_5, world=3) as ranks:
        for rank in (0, 2):
            code, message, _ = ranks.ends(rank)
            assert code == 8 and "rank 1" in message.split(";")[0] and "of step 5" in message


def raises_at_5(rank):
    def fail():
        raise tr.DataError("the sample is odd")

    if rank == 1:
        at(5, fail)


def test_the_error_of_one_rank_is_told_by_all(tmp_path):
    with Ranks(tmp_path, raises_at_5) as ranks:
        assert ranks.ends(1)[:2] == (4, "DataError: the sample is odd")
        code, message, _ = ranks.ends(0)
        assert code == 4 and "rank 1 ended: the sample is odd; rank 0 was in" in message


def lingers_at_5(rank):
    """The rank that failed does not go away, so that nothing is closed and the other cannot know from its socket."""
    raises_at_5(rank)
    long = 100 * PATIENCE
    os._exit_now, os._exit = os._exit, lambda code: time.sleep(long) if rank == 1 and code == 0 else os._exit_now(code)


def test_a_rank_that_cannot_be_woken_is_ended(tmp_path):
    with Ranks(tmp_path, lingers_at_5) as ranks:
        assert ranks.ends(1)[0] == 4
        assert ranks.ends(0)[0] == 4


def stops_at_5(rank):
    if rank == 1:
        at(5, lambda: me(signal.SIGSTOP))


def test_a_stopped_rank_is_waited_for_so_long_and_no_longer(tmp_path):
    with Ranks(tmp_path, stops_at_5, timeout=15.0) as ranks:  # more than any step takes on a busy machine
        code, message, _ = ranks.ends(0)
        assert code == 8 and "rank 1" in message.split(";")[0]
        code, message, _ = ranks.ends(1)  # it is woken to see that the run has ended; SIGTERM would not reach it
        assert code == 8 and "rank 1 has not answered" in message + (tmp_path / "rank-1.err").read_text()


def skips_at_5(rank):
    import torch
    import torch.distributed as dist

    if rank == 0:
        at(5, lambda: dist.all_reduce(torch.zeros(1)))


def test_a_rank_at_another_collective_is_noticed_before_the_timeout(tmp_path):
    with Ranks(tmp_path, skips_at_5) as ranks:
        for rank in range(2):
            code, message, _ = ranks.ends(rank)
            told = message + (tmp_path / f"rank-{rank}.err").read_text()  # the first to end cannot be woken
            assert code == 8
            assert "the ranks wait at different collectives" in told and "rank 1 forward of step 5" in told
