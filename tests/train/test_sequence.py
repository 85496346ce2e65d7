"""The trainer on meshes whose ranks share rows: every number that it writes is that of one rank."""

import json
from dataclasses import replace

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.toy_run import chats, job
from treering.train import train
from treering.train.config import Checkpoint, Evaluate, Optimizer
from treering.train.export import reopen

MESHES = [{"sequence": 2}, {"sequence": 3}, {"shard": 2, "sequence": 2}, {"sequence": 4}]
EVERY = {
    "steps": 4,
    # AdamW divides by what is at first one gradient: an element whose gradient is rounding would move as far as others
    "optimizer": Optimizer(name="sgd", lr=0.1),
    "evaluate": Evaluate(every=2, prompts=("say 1",), new_tokens=3),
    "checkpoint": Checkpoint(every=2),
}


def world(sizes):
    return sizes.get("shard", 1) * sizes.get("sequence", 1)


def toy(root, output, sizes, packing="on", **changes):
    techniques = changes.pop("adapting", (tr.Full(),))
    techniques += (tr.TiledLoss(tile=7), tr.Recompute(), tr.Ulysses()) + ((tr.Shard(),) if sizes else ())
    data = {"eval": str(chats(root / "held out.jsonl", 6)), "packing": packing}
    mesh = {"replicate": 1, "shard": sizes.get("shard", 1), "sequence": sizes.get("sequence", 1)}
    return job(root, output, techniques=techniques, data=data, mesh=mesh, train=EVERY, **changes)


def trained(*arguments):
    train(toy(*arguments))


def lines(root, output, kind, columns):
    text = (root / output / "metrics.jsonl").read_text().splitlines()
    return [{name: m[name] for name in columns} for m in map(json.loads, text) if m["kind"] == kind]


@pytest.mark.parametrize("packing", ["on", "off"])
def test_the_log_has_the_same_numbers_on_every_mesh(tmp_path, packing):
    on_ranks(1, trained, tmp_path, "alone", {}, packing)
    for sizes in MESHES if packing == "on" else MESHES[1:3]:
        output = f"shared {world(sizes)} {sizes['sequence']}"
        on_ranks(world(sizes), trained, tmp_path, output, sizes, packing)
        for kind, columns in (
            ("step", ("step", "loss", "norm", "tokens")),
            ("evaluation", ("step", "held_out_loss")),
        ):
            wanted, found = (lines(tmp_path, of, kind, columns) for of in ("alone", output))
            assert len(found) == len(wanted) > 0
            for one, other in zip(found, wanted):
                assert one == {name: pytest.approx(value, rel=1e-6) for name, value in other.items()}, sizes
        texts = [[m["text"] for m in lines(tmp_path, of, "note", ("text",))] for of in ("alone", output)]
        assert [t for t in texts[0] if "say 1" in t] == [t for t in texts[1] if "say 1" in t] != []


def steady(root, output, sizes, steps):
    """A constant rate, so that a run that is cut is the beginning of a longer one."""
    made = toy(root, output, sizes)
    schedule = replace(made.train.schedule, name="constant")
    train(replace(made, train=replace(made.train, steps=steps, schedule=schedule)))


def test_a_checkpoint_resumes_on_another_mesh(tmp_path):
    on_ranks(1, steady, tmp_path, "alone", {}, 4)
    on_ranks(2, steady, tmp_path, "moved", {"sequence": 2}, 2)
    on_ranks(3, steady, tmp_path, "moved", {"sequence": 3}, 3)
    on_ranks(1, steady, tmp_path, "moved", {}, 4)
    wanted, found = (dict(reopen(toy(tmp_path, of, {})).plain()) for of in ("alone", "moved"))
    assert_all_same(found, wanted, 1e-6)


def protected(root, output, sizes):
    made = toy(root, output, sizes, adapting=(tr.OSFT(protect="inputs", targets=("q_proj", "down_proj")),))
    train(made)


def test_statistics_that_grow_at_the_end_are_those_of_one_rank(tmp_path):
    from treering.curvature import open as open_statistics

    run = tr.compose(str(toy(tmp_path, "first", {}).model.path), [tr.Full()], dtype="float32")
    ids = torch.arange(3, 90)[None]
    tr.measure(run, [{"input_ids": ids}], to=tmp_path / "model" / "statistics")
    on_ranks(1, protected, tmp_path, "alone", {})
    on_ranks(3, protected, tmp_path, "shared", {"sequence": 3})
    wanted, found = (open_statistics(tmp_path / of / "statistics") for of in ("alone", "shared"))
    assert [ring.tokens for ring in found.rings] == [ring.tokens for ring in wanted.rings]
    for name in wanted:
        assert_all_same(dict(found[name]), dict(wanted[name]), 1e-5)
