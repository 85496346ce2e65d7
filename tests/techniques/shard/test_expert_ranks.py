"""Experts assigned to ranks: numbers equal to those of one process, whatever the routing."""

import pytest
import torch
import torch.distributed as dist

import treering as tr
from tests.experts.families import experts_of, family
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.toy import gradients, rows, weights
from treering.core.topology import data_rank
from treering.experts.grouped_forward import grouped_of
from treering.techniques.shard.units import SHARDS_CODES

LORA = tr.LoRA(rank=4, targets="all-linear")
TWO = [LORA, tr.LoRA(name="second", rank=2, targets=("down_proj",), init="kaiming_zeros")]
INT8 = tr.Quantize(format="int8")

# model, skewed, techniques, settings of shard. The routers compute in float32, hence the tolerance.
CASES = {
    "full": ("qwen3_moe", False, [tr.Full()], {}),
    "full skewed": ("deepseek_v3", True, [tr.Full()], {}),
    "full tiled": ("qwen3_moe", False, [tr.Full(), tr.TiledMLP(tile=5), tr.TiledLoss(tile=5)], {"hold": "all"}),
    "lora": ("gpt_oss", True, TWO, {"offload": "cpu"}),
    "lora recomputed": ("qwen3_moe", False, [LORA, tr.Recompute(keep=("all_to_all",))], {}),
    "packed": ("gpt_oss", True, [LORA, tr.Quantize(format="int4", group=8)], {}),
    "packed tiled": ("qwen3_moe", False, [LORA, INT8, tr.TiledBlock(tile=5), tr.Recompute()], {}),
    "osft": ("qwen3_moe", False, [tr.OSFT(protect="weights", ratio=0.4, keep_initial=True)], {}),
    "compiled": ("qwen3_moe", False, [tr.Full(), tr.Compile(backend="aot_eager")], {}),
}


def model(name, skewed):
    """`skewed`: every token chooses the experts 0 and 1 alone."""
    built = family(name, "eager", dtype=torch.float64)
    biases = ("router.bias", "e_score_correction_bias")
    found = [value for key, value in built.state_dict().items() if key.endswith(biases)]
    for bias in found if skewed else ():
        bias[:2] += 50.0
    assert found or not skewed
    return built


def trained(case, mesh, prepared):
    """Loss, gradients, norm and weights of one clipped step."""
    name, skewed, techniques, settings = CASES[case]
    several = mesh is not None
    chosen = [t for t in techniques if several or not isinstance(t, tr.Recompute)]
    run = tr.compose(
        model(name, skewed),
        [*chosen, *([tr.Shard(**settings)] if several else [])],
        mesh=tr.mesh(**mesh) if several else None,
        prepared=prepared,
    )
    rank, ranks = data_rank(run.plan.mesh)
    batches = rows(4)[rank::ranks]
    found = {name: value.clone() for name, value in gradients(run, batches).items()}
    [ready] = list(run.steps([batches]))
    with torch.no_grad():
        loss = run.total(sum(run.loss(batch) for batch in ready))
    norm = run.step(run.optimizer(torch.optim.SGD, lr=0.3), clip=0.05).norm
    return torch.stack([loss, torch.tensor(norm, dtype=loss.dtype)]), found, weights(run)


def on_meshes(cases, prepared):
    return [trained(case, mesh, prepared) for case, mesh in cases]


def compare(world, cases, folder):
    prepared = str(folder / "prepared")
    codes = {name for name, (_, _, chosen, _) in CASES.items() if any(isinstance(t, tr.Quantize) for t in chosen)}
    cases = [(case, mesh) for case, mesh in cases if SHARDS_CODES or case not in codes]
    wanted = [trained(case, None, prepared) for case, _ in cases]
    for ranks in on_ranks(world, on_meshes, cases, prepared):
        for (case, mesh), found, want in zip(cases, ranks, wanted, strict=True):
            try:
                assert_all_same({"loss and norm": found[0]}, {"loss and norm": want[0]}, 1e-6)
                assert_all_same(found[1], want[1], 1e-6)
                assert_all_same(found[2], want[2], 1e-6)
            except AssertionError as error:
                raise AssertionError(f"{case} on {mesh}: {error}") from None


def test_two_ranks_with_half_of_the_experts_each_train_like_one_process(tmp_path):
    compare(
        2, [(case, {"expert": 2}) for case in ("full skewed", "full tiled", "lora", "packed tiled", "osft")], tmp_path
    )


def test_four_ranks_shard_their_experts_and_copies_add_their_gradients(tmp_path):
    cases = [
        ("full", {"expert": 2}),
        ("packed", {"expert": 2}),
        ("lora", {"expert": 4}),
        ("osft", {"expert": 2}),
        ("full skewed", {"replicate": 2, "expert": 2}),
    ]
    compare(4, cases, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_case_on_every_mesh(tmp_path, world):
    meshes = [{"expert": 2}] if world == 2 else [{"expert": 2}, {"expert": 4}, {"replicate": 2, "expert": 2}]
    compare(world, [(case, mesh) for mesh in meshes for case in CASES], tmp_path)


def received(skewed):
    """Rows that arrive at each layer of a rank, and the rows of the stacks that it stores."""
    run = tr.compose(model("gpt_oss", skewed), [tr.Full(), tr.Shard()], mesh=tr.mesh(expert=2))
    seen = []
    for module in experts_of(run.model).values():
        inner = grouped_of(module)
        inner.sources["down_proj"] = Counting(inner.sources["down_proj"], seen)
    gradients(run, rows(2)[dist.get_rank() :: 2])
    return seen, [p.to_local().shape[0] for n, p in run.trainable() if n.endswith("down_proj")]


class Counting:
    def __init__(self, source, seen):
        self.source, self.seen = source, seen

    def product(self, x, routing):
        self.seen.append(len(x))
        return self.source.product(x, routing)


def test_a_rank_computes_the_rows_of_its_experts_and_there_may_be_none():
    tokens = sum(batch["input_ids"].numel() for batch in rows(2))
    (first, stored), (second, _) = on_ranks(2, received, True)
    assert stored == [2, 2]
    assert first == [2 * tokens] * 2 and second == [0, 0]
    for one, other in zip(*(seen for seen, _ in on_ranks(2, received, False))):
        assert one + other == 2 * tokens and 0 < one != other > 0, "the routing is even: the case tests nothing"


def narrow(targets):
    """Adapters in float32 inside a bfloat16 model, and the dtypes of their gradients."""
    built = family("qwen3_moe", "eager", dtype=torch.bfloat16)
    techniques = [tr.LoRA(rank=4, targets=targets, dtype="float32")]
    if dist.get_world_size() == 2:
        run = tr.compose(built, [*techniques, tr.Shard(compute="bfloat16")], mesh=tr.mesh(expert=2))
    else:
        run = tr.compose(built, [*techniques, tr.Shard(compute="bfloat16")])
    rank, ranks = data_rank(run.plan.mesh)
    found = gradients(run, rows(2)[rank::ranks])
    stored = {str(p.dtype) for name, p in run.model.named_parameters() if name.endswith("_proj")}
    return found, stored, {str(g.dtype) for g in found.values()}


@pytest.mark.parametrize("targets", ["all-linear", ("down_proj",)])
def test_float32_adapters_on_assigned_experts_stay_float32_under_bfloat16(targets):
    [(wanted, *_)] = on_ranks(1, narrow, targets)
    for found, stored, dtypes in on_ranks(2, narrow, targets):
        assert stored == {"torch.bfloat16"} and dtypes == {"torch.float32"}
        assert_all_same(found, wanted, 2e-2)  # activations are rounded to bfloat16 in both


def test_a_base_that_is_cast_gives_its_adapters_units_of_their_own():
    for notes in on_ranks(2, cast):
        assert "modules with a pinned dtype have units of their own" in notes


def cast():
    built = family("qwen3_moe", "eager")
    techniques = [tr.LoRA(rank=4, targets="all-linear", dtype="float32"), tr.Shard(compute="bfloat16")]
    run = tr.compose(built, techniques, mesh=tr.mesh(expert=2))
    found = gradients(run, rows(2)[dist.get_rank() :: 2])
    assert {g.dtype for g in found.values()} == {torch.float32}
    assert all(bool(g.abs().sum() > 0) for name, g in found.items() if name.endswith(".B"))
    return run.explain()


REFUSED = {
    "does not divide the 4 experts of model.layers.0.mlp.experts; choose expert from 1, 2, 4": (
        "qwen3_moe",
        3,
        [tr.Full(), tr.Shard()],
    ),
    "this llama model has no stacked experts": ("llama", 2, [tr.Full(), tr.Shard()]),
    "no technique assigns experts to ranks: add shard": ("qwen3_moe", 2, []),
    "form factors makes weights of experts from factors that are not assigned to ranks": (
        "qwen3_moe",
        2,
        [tr.OSFT(protect="weights", ratio=0.5, form="factors"), tr.Shard()],
    ),
    "experts that are assigned to ranks are not run in groups": (
        "qwen3_moe",
        2,
        [tr.Full(), tr.TiledMLP(experts="groups"), tr.Shard()],
    ),
}


def refusals():
    from tests.zoo import build

    found = []
    for name, ranks, techniques in REFUSED.values():
        try:
            tr.compose(build(name), techniques, mesh=tr.mesh(expert=ranks), frozen=not techniques)
        except tr.PlanError as error:
            found.append(str(error))
    return found


def test_what_cannot_be_assigned_is_refused_by_name():
    for found in on_ranks(6, refusals):
        assert len(found) == len(REFUSED), found
        assert all(wanted in text for wanted, text in zip(REFUSED, found)), found
