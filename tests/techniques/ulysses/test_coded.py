"""Messages in 8 bits: half of the bytes, errors that are those of the codec, and the same choice on every rank."""

import pytest
import torch
import torch.distributed as dist

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same, assert_same
from tests.techniques.ulysses.test_exchange import GRIDS, Case, flat, over_ranks, ranks_of
from tests.toy import packed, train, weights
from tests.zoo import build
from treering.core.row_messages import recorded
from treering.core.topology import data_rank
from treering.techniques.ulysses.coded import Codecs, CodingErrors
from treering.techniques.ulysses.shares import Grid

CASES = [
    Case(lengths=(13, 11, 1, 5), heads=(6, 2), widths=(32, 16)),
    Case(lengths=(24,), heads=(4, 4), widths=(16, 16), sinks=True),
    Case(lengths=(3,), heads=(1, 1), widths=(16, 16)),
]
BOUNDS = {"int8": 0.02, "e4m3": 0.08}


def coded(name, uncoded=()):
    for heads, gathered in GRIDS[dist.get_world_size()]:
        for case in CASES:
            errors = CodingErrors(every=1)
            exact, ranks = ranks_of(Grid(heads=heads, gathered=gathered), "collective"), None
            ranks = type(exact)(**{**vars(exact), "codecs": Codecs.of(name, uncoded, errors)})
            with recorded() as record:
                found, wanted = over_ranks(case, ranks)
            with recorded() as plain:
                over_ranks(case, exact)
            difference = (flat(found) - flat(wanted)).norm() / flat(wanted).norm()
            assert 0 < difference < BOUNDS[name], f"{case} {heads} × {gathered}: {difference}"
            assert record.calls == plain.calls
            if sum(case.lengths) > 20 and not uncoded:  # shorter ones are mostly scales and means
                assert 0 < sum(record.bytes.values()) < 0.4 * sum(plain.bytes.values())  # of float64
            told = errors.metrics(dist.group.WORLD)
            assert all(0 < value < BOUNDS[name] for value in told.values())
            assert told.keys() <= {"ulysses/error_forward", "ulysses/error_gradients"}


@pytest.mark.parametrize("name", ["int8", "e4m3"])
@pytest.mark.parametrize("world", [2, 3])
def test_errors_are_those_of_the_codec(world, name):
    on_ranks(world, coded, name)


def test_rows_and_columns_are_coded():
    on_ranks(4, coded, "int8", ("key",))


def gradients_as_they_are():
    exact = ranks_of(Grid(heads=2), "collective")
    ranks = type(exact)(**{**vars(exact), "codecs": Codecs.of("int8", ("query", "key", "value", "output"))})
    found, wanted = over_ranks(CASES[0], ranks)
    assert_same(found["out"], wanted["out"], 1e-12)
    assert not torch.allclose(found["query"], wanted["query"], rtol=1e-9)
    ranks = type(exact)(**{**vars(exact), "codecs": Codecs.of("int8", ("output", "gradients"))})
    found, wanted = over_ranks(CASES[0], ranks)
    assert not torch.allclose(found["out"], wanted["out"], rtol=1e-9)


def test_what_is_uncoded_is_exact():
    on_ranks(2, gradients_as_they_are)


def trained(sizes, codec, layout="heads"):
    mesh = tr.mesh(**sizes) if sizes else None
    technique = tr.Ulysses(codec=codec, layout=layout)
    run = tr.compose(build("qwen3"), [tr.Full(), tr.Recompute(), technique, tr.Shard()], mesh=mesh)
    rank, ranks = data_rank(mesh)
    losses = train(run, [[packed((7, 3, 2)), packed((9, 4), seed=1)][rank::ranks]] * 3, lr=0.1)
    return [float(run.total(torch.tensor(loss))) for loss in losses], weights(run), run.metrics()


@pytest.mark.parametrize("layout", ["heads", "gathered"])
def test_a_run_with_a_codec_trains_nearly_the_same_on_all_ranks_alike(layout):
    exact, _, metrics = on_ranks(2, trained, {"shard": 1, "sequence": 2}, "none", layout)[0]
    assert not metrics
    first, second = on_ranks(2, trained, {"shard": 1, "sequence": 2}, "int8", layout)
    assert_all_same(first[1], second[1])
    assert first[2] == second[2] and 0 < first[2]["ulysses/error_forward"] < 0.02
    assert first[0] == pytest.approx(exact, rel=1e-3) and first[0] != exact


def refused():
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=128, hidden_size=40, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, head_dim=10
    )
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(tr.PlanError, match="heads of 10"):
        tr.compose(model, [tr.Full(), tr.Ulysses(codec="int8"), tr.Shard()], mesh=tr.mesh(shard=1, sequence=2))


def test_a_width_that_cannot_be_rotated_is_refused():
    on_ranks(2, refused)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"uncoded": ("key",)}, "codec is none"),
        ({"uncoded": ("keys",), "codec": "int8"}, "it may have query, key, value, output, gradients"),
        ({"uncoded": "key", "codec": "int8"}, "write a list"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(tr.ConfigError, match=message):
        tr.Ulysses(**settings)
