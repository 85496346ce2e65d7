"""A sequence of tasks: each run finds the rings of those before it, protects them, and adds its own when it ends."""

import json
import signal

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_same
from tests.toy_run import chats, folder, job
from tests.train.test_faults import me
from treering.curvature import Ring
from treering.curvature import open as open_statistics
from treering.train import calibration, train
from treering.train import measurements as rings
from treering.train.callbacks import Callback
from treering.train.config import Checkpoint, StatisticsSection
from treering.train.export import export
from treering.train.prepare import open_data, open_tokenizer
from treering.train.run import draft_of

SHORT = {"steps": 3, "checkpoint": Checkpoint(every=2, keep=5)}
TOKENS = 300


def toy(root, output="run", **changes):
    settings = changes.pop("train", {})
    own = {"statistics": StatisticsSection(tokens=TOKENS)} | changes
    return job(root, output, train=SHORT | settings, **own)


@pytest.fixture
def root(tmp_path):
    """A model whose folder has statistics of old text."""
    start(tmp_path)
    return tmp_path


def start(root):
    model = folder(root / "model")
    run = tr.compose(model, [tr.Full()])
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "real": torch.ones(2, 40, dtype=torch.bool)}
    tr.measure(run, [batch], ring=Ring(name="old text", tokens=0, data="old"), to=model / "statistics")
    chats(root / "chat.jsonl")


def notes(root, output="run"):
    lines = map(json.loads, (root / output / "metrics.jsonl").read_text().splitlines())
    return [line["text"] for line in lines if line["kind"] == "note"]


def test_a_run_adds_its_ring_and_an_export_carries_it_to_the_next(root):
    first = toy(root)
    train(first)
    old, grown = open_statistics(root / "model" / "statistics"), open_statistics(root / "run" / "statistics")
    assert [r.name for r in grown.rings] == ["old text", "step 3 of run"]
    assert grown.rings[1].tokens == TOKENS

    exported = export(first, root / "task1")
    assert open_statistics(exported / "statistics").digest == grown.digest
    # What was added is the mean over the sampled documents, on the model as it was trained.
    run = tr.compose(exported, [tr.Full()])
    data = open_data(first, open_tokenizer(first), run.plan)
    documents = calibration.sample(data.examples, TOKENS, first.seed)
    assert sum(len(d.ids) for d in documents) == TOKENS and calibration.digest(documents) == grown.rings[1].data
    own = tr.measure(run, [{"input_ids": torch.from_numpy(d.ids.astype("int64"))[None]} for d in documents])
    for weight in own:
        wanted = old[weight]["inputs"] + own[weight]["inputs"]
        assert_same(grown[weight]["inputs"], wanted, 1e-5, weight)
        assert int(grown[weight]["tokens"]) == 80 + TOKENS

    from dataclasses import replace

    second = toy(root, "run2")
    second = replace(second, model=replace(second.model, path=str(exported)))
    train(second)
    third = open_statistics(root / "run2" / "statistics")
    assert [r.name for r in third.rings] == ["old text", "step 3 of run", "step 3 of run2"]


def test_what_trains_in_tiles_is_measured_whole(root):
    plain = (tr.OSFT(), tr.Recompute())
    tiled = (*plain, tr.TiledBlock(tile=16), tr.TiledLoss(tile=16))
    for output, techniques in (("plain", plain), ("tiled", tiled)):
        train(toy(root, output, techniques=techniques))
    wanted, found = (open_statistics(root / output / "statistics") for output in ("plain", "tiled"))
    for weight in wanted:
        assert_same(found[weight]["inputs"], wanted[weight]["inputs"], 1e-4, weight)
        assert int(found[weight]["tokens"]) == int(wanted[weight]["tokens"])


def test_without_statistics_nothing_is_measured(tmp_path):
    train(toy(tmp_path))
    assert not (tmp_path / "run" / "statistics").exists()
    assert not (export(toy(tmp_path), tmp_path / "exported") / "statistics").exists()


def test_a_named_folder_is_used_and_must_be_there(root):
    elsewhere = root / "elsewhere"
    (root / "model" / "statistics").rename(elsewhere)
    train(toy(root, statistics=StatisticsSection(path=str(elsewhere), tokens=TOKENS)))
    assert len(open_statistics(root / "run" / "statistics").rings) == 2
    with pytest.raises(tr.CheckpointError, match="treering measure"):
        train(toy(root, "other", statistics=StatisticsSection(path=str(root / "nowhere"))))


def test_no_tokens_add_no_ring_and_the_old_ones_are_carried_on(root, caplog):
    made = toy(root, statistics=StatisticsSection(tokens=0))
    train(made)
    assert not (root / "run" / "statistics").exists()
    exported = export(made, root / "exported")
    assert [r.name for r in open_statistics(exported / "statistics").rings] == ["old text"]
    assert not caplog.records


def test_an_export_of_another_step_does_not_carry_the_ring_of_the_end(root, caplog):
    train(toy(root))
    exported = export(toy(root), root / "exported", step=2)
    assert [r.name for r in open_statistics(exported / "statistics").rings] == ["old text"]
    assert "not of step 2" in caplog.text


def test_a_finished_run_measures_no_second_time_and_a_longer_one_anew(root):
    train(toy(root))
    grown = root / "run" / "statistics"
    before = [(p.name, p.stat().st_mtime_ns) for p in sorted(grown.iterdir())]
    train(toy(root))
    assert [(p.name, p.stat().st_mtime_ns) for p in sorted(grown.iterdir())] == before
    train(toy(root, train={"steps": 5}))
    assert [r.name for r in open_statistics(grown).rings] == ["old text", "step 5 of run"]
    (next(grown.glob("*.safetensors"))).unlink()
    train(toy(root, train={"steps": 5}))
    assert [r.name for r in open_statistics(grown).rings] == ["old text", "step 5 of run"]


class At(Callback):
    def __init__(self, step):
        self.step = step

    def stepped(self, metrics):
        if metrics["step"] == self.step:
            me(signal.SIGINT)


def test_a_signal_leaves_no_half_ring_and_the_same_command_makes_it(root, monkeypatch):
    with pytest.raises(tr.Interrupted):
        train(toy(root), [At(2)])
    assert not (root / "run" / "statistics").exists()

    real = calibration.batches

    def interrupted(*given):
        me(signal.SIGINT)
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(rings.calibration, "batches", interrupted)
        with pytest.raises(tr.Interrupted, match="step 3 is saved, and its training data is not measured"):
            train(toy(root))
    assert not (root / "run" / "statistics").exists()
    train(toy(root))
    assert [r.name for r in open_statistics(root / "run" / "statistics").rings] == ["old text", "step 3 of run"]
    assert any("2 rings" in note for note in notes(root))


def test_a_run_is_not_gone_on_with_other_statistics(root):
    train(toy(root))
    tr.curvature.add([root / "model" / "statistics"] * 2, root / "model" / "statistics")
    with pytest.raises(tr.CheckpointError, match="another statistics"):
        train(toy(root, train={"steps": 5}))
    train(toy(root, train={"checkpoint": Checkpoint(every=2, keep=5, force=True)}))
    names = [r.name for r in open_statistics(root / "run" / "statistics").rings]
    assert names == ["old text", "old text", "step 3 of run"], "the rings it now begins with, and its own"


def test_statistics_of_another_model_are_refused_before_anything_is_read(root):
    from dataclasses import replace

    other = toy(root, statistics=StatisticsSection(path=str(root / "model" / "statistics")))
    wide = folder(root / "wide", hidden_size=64)
    with pytest.raises(tr.CheckpointError, match="another model"):
        draft_of(replace(other, model=replace(other.model, path=str(wide))))


def trained_on_ranks(root, packing, steps):
    train(toy(root, "sharded", techniques=(tr.Full(), tr.Shard()), data={"packing": packing}, train={"steps": steps}))


@pytest.mark.parametrize("packing", ["on", "off"])
def test_two_ranks_add_the_same_ring(root, packing):
    train(toy(root, "alone", data={"packing": packing}))
    on_ranks(2, trained_on_ranks, root, packing, 3)
    one, two = (open_statistics(root / n / "statistics") for n in ("alone", "sharded"))
    assert two.rings[1].data == one.rings[1].data and two.rings[1].tokens == TOKENS
    for weight in one:
        assert_same(two[weight]["inputs"], one[weight]["inputs"], 1e-4, weight)  # of weights trained apart
    on_ranks(2, trained_on_ranks, root, packing, 3)  # nothing left to do
    assert open_statistics(root / "sharded" / "statistics").digest == two.digest
    export(toy(root, "sharded", techniques=(tr.Full(), tr.Shard())), root / "exported")
    assert open_statistics(root / "exported" / "statistics").digest == two.digest
