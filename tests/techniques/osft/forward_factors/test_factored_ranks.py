"""The factored forms, sharded on real ranks, train the model that one process trains."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.toy import rows, train, weights
from tests.zoo import build
from treering.core.sharded import gather, local, put, settle
from treering.core.topology import data_rank
from treering.techniques.osft import OSFT

FORMS = [("forward", "coefficients"), ("factors", "coefficients"), ("factors", "gather"), ("factors", "cached")]
DOWN = "model.layers.0.mlp.down_proj.weight"
LAYER = "model.layers.0.self_attn"
# Of R directions: none held, one, all but one; and (o_proj) the ratio. Of one row, most ranks have none.
EDGES = {f"{LAYER}.q_proj.weight": 32, f"{LAYER}.k_proj.weight": 15, f"{LAYER}.v_proj.weight": 1}
CASES = {
    "llama": {"free": EDGES},
    "gpt2": {"targets": ("c_attn", "c_proj")},  # 96 rows over 32, transposed, biases
    "qwen3_moe": {"targets": ("experts", "q_proj", "k_proj")},  # 4 experts over 3 ranks: 2, 2, none
}
STEPS = 2


def trained(
    arch, form, communication, shard=None, mesh=None, folder=None, dtype=torch.float64, optimizer=torch.optim.AdamW
):
    config = OSFT(protect="weights", form=form, communication=communication, **CASES[arch])
    techniques = [config] if shard is None else [config, tr.Shard(**shard)]
    made = tr.mesh(**mesh) if mesh is not None else None
    run = tr.compose(build(arch, dtype=dtype), techniques, mesh=made, prepared=folder)
    rank, ranks = data_rank(run.plan.mesh)
    settings = {"weight_decay": 0.0} if optimizer is torch.optim.AdamW else {"momentum": 0.9}
    train(run, [rows(6, seed=i)[rank::ranks] for i in range(STEPS)], optimizer, lr=1e-2, **settings)
    least = min(local(p).numel() for _, p in run.trainable())
    return weights(run), run.metrics(), least


def on_a_mesh(mesh, cases, folder):
    return {case: trained(*case, {}, mesh, Path(folder)) for case in cases}


def compare(world, mesh, cases, tolerance=1e-5):
    wanted = {}
    for case in cases:
        wanted[case[0]] = wanted.get(case[0]) or trained(case[0], "factors", "coefficients")
    with tempfile.TemporaryDirectory() as folder:
        for found in on_ranks(world, on_a_mesh, mesh, cases, folder):
            for case, (plain, metrics, least) in found.items():
                assert_all_same(plain, wanted[case[0]][0], tolerance)
                assert metrics["osft/leak"] < 1e-10, case
                if case[1] == "factors":
                    for name in ("osft/raw_norm", "osft/projected_norm"):
                        assert metrics[name] == pytest.approx(wanted[case[0]][1][name], rel=1e-6), case
                yield case, least


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_train_like_one_process(world):
    """The wires that are left out here run in the long suite."""
    cases = {
        2: [("llama", *FORMS[0]), ("llama", *FORMS[2])],
        3: [("llama", *FORMS[1]), ("llama", *FORMS[3]), ("qwen3_moe", *FORMS[1])],
        4: [("llama", *FORMS[0]), ("llama", *FORMS[1])],
    }[world]
    least = [least for _, least in compare(world, {"shard": world}, cases, 1e-8)]
    assert 0 in least, "no shard was empty: the case does not test what it says"


def test_replicas_of_shards_train_like_one_process():
    list(compare(4, {"replicate": 2, "shard": 2}, [("llama", *FORMS[1]), ("llama", *FORMS[3])], 1e-8))


def test_replicas_alone_train_like_one_process():
    """Nothing is sharded: every rank has all rows, and a sum over ranks would be twice the truth."""
    list(compare(2, {"replicate": 2, "shard": 1}, [("llama", *FORMS[1]), ("llama", *FORMS[2])], 1e-8))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_form_of_every_architecture_trains_like_one_process(world):
    list(compare(world, {"shard": world}, [(arch, *form) for arch in CASES for form in FORMS], 1e-8))
    if world == 4:
        list(compare(4, {"replicate": 2, "shard": 2}, [(arch, *form) for arch in CASES for form in FORMS], 1e-8))


def narrow(folder, offload):
    """bfloat16 all around, and what each unit's factors are when the forward reads them."""
    seen, leaks = set(), {}
    for form in FORMS[2:3] if offload == "cpu" else FORMS[:2]:
        config = OSFT(protect="weights", form=form[0], communication=form[1])
        shard = tr.Shard(compute="bfloat16", offload=offload)
        run = tr.compose(build("llama"), [config, shard], mesh=tr.mesh(), prepared=Path(folder))
        module = run.model.model.layers[0].mlp.down_proj.osft
        start = weights(run)[DOWN]
        module.register_forward_pre_hook(lambda m, given: seen.add((m.V_high.dtype, m.U_low.dtype, given[0].dtype)))
        rank, ranks = data_rank(run.plan.mesh)
        losses = train(run, [rows(4)[rank::ranks]] * 4, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
        assert losses[-1] < losses[0]
        leaks[form] = run.metrics()["osft/leak"]
        D = weights(run)[DOWN] - start
        settle(run.model)
        U, V = (gather(getattr(module, f"{end}_high")) for end in "UV")
        for name, leak in (("U", (U.mT if module.turned else U).mT @ D), ("V", D @ (V.mT if module.turned else V))):
            leaks[f"{form} {name}ᵀ ΔW"] = float(leak.norm() / D.norm())
    return {str(s) for s in seen}, leaks


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_bfloat16_around_them_leaves_bases_in_float32_and_nothing_leaks(offload):
    with tempfile.TemporaryDirectory() as folder:
        for seen, leaks in on_ranks(2, narrow, folder, offload):
            assert seen == {"(torch.float32, torch.float32, torch.bfloat16)"}
            assert max(leaks.values()) < 1e-5, leaks


def quiet():
    """Messages of a step, by kind, besides FSDP's own."""
    from tests.techniques.osft.forward_factors.test_communication import Counted

    found = {}
    for form in FORMS:
        config = OSFT(protect="weights", form=form[0], communication=form[1])
        with tempfile.TemporaryDirectory() as folder:
            box = [folder]
            dist.broadcast_object_list(box)
            run = tr.compose(build("llama"), [config, tr.Shard()], mesh=tr.mesh(), prepared=Path(box[0]))
            dist.barrier()
        applied = run.plan.applied[0]
        counts = []
        for again in range(3):
            if again == 2:  # the same values, but written anew, as a resume does
                for name, p in run.model.named_parameters():
                    if name.endswith("_high"):
                        put(p, gather(p))
            for ready in run.steps([rows(4)[dist.get_rank() :: 2]]):
                for batch in ready:
                    run.loss(batch).backward()
            with Counted() as count:
                for work in (applied.gradients, applied.after_step):
                    if work is not None:
                        work()
            counts.append((count.summed, count.gathered))
        found[f"{form[0]} {form[1]}"] = counts
    return found


def wanted_elements(communication, free=True):
    """For one projection of all of the small llama's targets: Σ over sides of what the table says."""
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    total = 0
    for N, M in shapes:
        R = min(N, M)
        low, high = R // 4, R - R // 4
        for size in (N, M):
            k = low if size == R else high
            if size == R and not free:
                continue
            total += k * low if communication == "coefficients" else -(-k // 2) * size
    return 2 * total  # layers


def test_a_step_sends_what_the_table_says_and_forward_nothing():
    twice = 2  # gradients and parameters
    for found in on_ranks(2, quiet):
        coefficients, gathered = wanted_elements("coefficients"), wanted_elements("gather")
        assert found["forward coefficients"] == [(0, 0)] * 3
        assert found["factors coefficients"] == [(twice * coefficients, 0)] * 3
        assert found["factors gather"] == [(0, twice * gathered)] * 3
        assert found["factors cached"] == [(0, gathered), (0, 0), (0, wanted_elements("gather", free=False))]
