"""`copy.deepcopy` and pickle of a composed model: the copy computes with its own weights, and the original never knows.

A technique that replaces a forward by a closure would pass every test of training and fail here: the closure goes with
the copy, and what it refers to stays the original's.
"""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same, assert_same
from tests.techniques.osft.measured import moments
from tests.toy import packed, rows
from tests.zoo import build
from treering.anatomy import examine
from treering.core.seeds import generator
from treering.curvature.observe import observe
from treering.plan.batches import with_targets

TARGETS = ("q_proj", "down_proj")
LORA = tr.LoRA(targets=TARGETS, rank=4, dtype="float64")


def osft(form, **settings):
    return tr.OSFT(form=form, **({"protect": "weights", "ratio": 0.4, "targets": TARGETS} | settings))


ADAPTING = {
    "full": tr.Full(),
    "lora": LORA,
    "lora (pissa)": tr.LoRA(targets=TARGETS, rank=4, dtype="float64", init="pissa"),
    "osft": osft("update"),
    "osft (inputs)": osft("update", protect="inputs", ratio=None),
    "osft (keep_initial)": osft("update", keep_initial=True, communication="cached"),
    "osft (one_sided)": osft("one_sided"),
    "osft (core)": osft("core"),
    "osft (forward)": osft("forward"),
    "osft (factors)": osft("factors"),
    "osft (gathered factors)": osft("factors", communication="cached"),
}
HELPING = {
    "tiledmlp": tr.TiledMLP(tile=5),
    "tiledblock": tr.TiledBlock(tile=5),
    "tiledloss": tr.TiledLoss(tile=5),
    "recompute": tr.Recompute(offload="cpu"),
    "compile": tr.Compile(backend="eager"),
}
EVERY = ("tiledblock", "tiledloss", "recompute")
EXPERTS = {
    "osft (experts)": osft("update", targets=("gate_up_proj",)),
    "osft (factored experts)": osft("factors", targets=("gate_up_proj",)),
}
GROUPS = {"tiledmlp": tr.TiledMLP(tile=5, experts="groups"), "tiledblock": tr.TiledBlock(tile=5)}

CASES = {
    **{name: ("llama", [one]) for name, one in ADAPTING.items()},
    **{f"lora, {name}": ("llama", [LORA, one]) for name, one in HELPING.items()},
    **{f"{name}, all": ("llama", [one, *(HELPING[n] for n in EVERY)]) for name, one in ADAPTING.items()},
    "full, recompute, compile": ("llama", [tr.Full(), HELPING["recompute"], HELPING["compile"]]),
    "lora twice": ("llama", [LORA, tr.LoRA(name="other", targets=TARGETS, rank=2, dtype="float64")]),
    **{name: ("qwen3_moe", [one]) for name, one in EXPERTS.items()},
    **{f"osft (experts), {h}": ("qwen3_moe", [EXPERTS["osft (experts)"], tiled]) for h, tiled in GROUPS.items()},
    "full, all, gemma2": ("gemma2", [tr.Full(), *(HELPING[n] for n in EVERY)]),
}
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


def composed(case):
    architecture, techniques = CASES[case]
    model = build(architecture, dtype=torch.float64)
    osfts = [t for t in techniques if isinstance(t, tr.OSFT) and t.protect != "weights"]
    return tr.compose(model, techniques, statistics=moments(model, osfts[0]) if osfts else None)


def state(model):
    """Every value that a copy may have of its own."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


@torch.no_grad()
def disturb(model):
    for name, value in model.named_parameters():
        value.add_(0.05 * torch.randn(value.shape, generator=generator(3, name), dtype=torch.float64).to(value.dtype))


def computed(run, model):
    """Loss and gradients by the loss of `run`, and the logits."""
    batch = rows(1, lengths=(12,))[0] if run.plan.unpackable else packed((7, 5))
    loss = run._loss(model, with_targets(batch), run.plan.objective)
    loss.backward()
    found = {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    return found | {"loss": loss.detach(), "logits": logits}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("case", CASES)
def test_a_copy_computes_with_its_own_weights_and_the_original_with_its(case, how):
    run, fresh = composed(case), composed(case)
    wanted = computed(run, run.model)  # a forward and a backward before the copy is made: techniques have looked by now
    other = COPIES[how](run.model)
    assert not {id(value) for value in state(run.model).values()} & {id(value) for value in state(other).values()}
    assert_all_same(computed(run, other), wanted)

    before = {name: value.clone() for name, value in state(run.model).items()}
    disturb(other)
    disturb(fresh.model)
    found = computed(fresh, fresh.model)
    assert_all_same(computed(run, other), found)
    assert not torch.equal(found["logits"], wanted["logits"])
    assert all(p.grad is None for p in run.model.parameters())

    optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1)
    run._loss(other, with_targets(packed((7, 5))), run.plan.objective).backward()
    optimizer.step()
    assert_all_same(dict(state(run.model)), before)
    assert_all_same(computed(run, run.model), wanted)


@pytest.mark.parametrize("case", ["lora, all", "osft (factors), all", "osft (keep_initial)"])
def test_the_original_trains_on_as_if_there_were_no_copy(case):
    weights = []
    for copying in (False, True):
        run = composed(case)
        other = copy.deepcopy(run.model) if copying else None
        optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
        for batches in run.steps([[packed((7, 5))]]):
            run.loss(batches[0]).backward()
            run.step(optimizer)
        weights.append({name: value.detach() for name, value in state(run.model).items()})
        if other is not None:
            kept = {name: value.detach() for name, value in state(other).items()}
            assert_all_same(kept, {name: value.detach() for name, value in state(composed(case).model).items()})
    assert_all_same(weights[1], weights[0])


@pytest.mark.parametrize("case", ["lora, tiledblock", "osft (forward), all"])
def test_one_block_is_copied_without_the_rest_of_the_model(case):
    run = composed(case)
    block = run.model.model.layers[0]
    assert len(pickle.dumps(block)) < 0.6 * len(pickle.dumps(run.model))


READ = """
import pickle, sys, torch
model = pickle.load(open(sys.argv[1], "rb"))
ids = torch.arange(3, 15)[None]
with torch.no_grad():
    torch.save(model(input_ids=ids, use_cache=False).logits, sys.argv[2])
"""


def test_another_process_reads_a_pickle(tmp_path):
    """Nothing of ours is imported there but what the pickle names."""
    run = composed("lora, all")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(run.model))
    arguments = [sys.executable, "-c", READ, str(tmp_path / "model.pkl"), str(tmp_path / "logits")]
    subprocess.run(arguments, check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})
    with torch.no_grad():
        wanted = run.model(input_ids=torch.arange(3, 15)[None], use_cache=False).logits
    assert_same(torch.load(tmp_path / "logits"), wanted, 1e-12, "logits")


def test_a_model_is_not_copied_while_it_is_observed():
    model = build("llama")
    with observe(model, examine(model)):
        for how in COPIES.values():
            with pytest.raises(tr.PlanError, match=r"is being observed.*leave the `with observe"):
                how(model)
    copy.deepcopy(model)


def test_a_run_is_not_copied_but_its_model_is():
    run = composed("lora")
    for how in (*COPIES.values(), copy.copy):
        with pytest.raises(tr.PlanError, match=r"Copy the model.*compose"):
            how(run)


def on_a_mesh():
    """Without Shard: what is held is dealt over the mesh all the same, as DTensors."""
    model = build("llama")
    run = tr.compose(model, [osft("update")], mesh=tr.mesh())
    wanted = computed(run, run.model)
    other = copy.deepcopy(run.model)
    disturb(other)
    assert_all_same(computed(run, run.model), wanted)
    assert not torch.equal(computed(run, other)["logits"], wanted["logits"])


def test_a_model_on_a_mesh_that_is_not_sharded_is_copied():
    on_ranks(1, on_a_mesh)


def sharded():
    run = tr.compose(build("llama"), [tr.Full(), tr.Shard()])
    found = []
    for module in (run.model, run.model.model.layers[0]):
        for how in COPIES.values():
            try:
                how(module)
                found.append("copied")
            except tr.PlanError as error:
                found.append(str(error))
    return found


def test_a_sharded_model_says_why_it_cannot_be_copied():
    for found in on_ranks(1, sharded):
        assert all("sharded" in text and "run.export" in text for text in found)
