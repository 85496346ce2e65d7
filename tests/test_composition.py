"""Every pair of techniques is numerically equal to the plain reference, or refused. There is no third state.

`python -m tests.test_composition > docs/composition.md` prints the table below as a page.

The reference knows no technique: transformers' own model with the weights that the run holds, each document a row of
its own, one backward over the whole global batch. The gradients of what a technique trains instead of a weight W follow
from that of W: they are those of ⟨∂W, W(x)⟩, with W(x) the technique's formula, a line each in `FORMULAS`. One step of
SGD by hand then gives the weights that the run must export.
"""

import tempfile
from itertools import combinations
from pathlib import Path

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.toy import packed, rows, weights
from tests.zoo import build
from treering.core.sharded import gather
from treering.core.topology import data_rank

RATE = 0.3
TARGETS = ("q_proj", "down_proj")
TECHNIQUES = {
    "full": tr.Full(),
    "lora": tr.LoRA(targets=TARGETS, rank=4, alpha=8.0, dtype="float64"),
    "lora (pissa)": tr.LoRA(name="pissa", targets=TARGETS, rank=4, alpha=8.0, dtype="float64", init="pissa"),
    "osft": tr.OSFT(protect="weights", ratio=0.4, targets=TARGETS),
    "osft (one_sided)": tr.OSFT(protect="weights", ratio=0.4, targets=TARGETS, form="one_sided"),
    "osft (forward)": tr.OSFT(protect="weights", ratio=0.4, targets=TARGETS, form="forward"),
    "osft (factors)": tr.OSFT(protect="weights", ratio=0.4, targets=TARGETS, form="factors"),
    "tiledmlp": tr.TiledMLP(tile=5),
    "tiledblock": tr.TiledBlock(tile=5),
    "tiledloss": tr.TiledLoss(tile=5),
    "recompute": tr.Recompute(offload="cpu"),
    "shard": tr.Shard(),
    "compile": tr.Compile(backend="aot_eager"),
}

EQUAL = "equal"
SAME = "decide what happens to the gradient of"
ALONE = "one of them must be alone in that"
REPLACED = "both replace the forward"
NOTHING = "nothing would be trained"
NO_SUM = "no technique sums their gradients"
MEANING = {
    EQUAL: "equal",
    SAME: "refused: one weight cannot be trained twice",
    ALONE: "refused: a start that moves the base must be alone on it",
    REPLACED: "refused: one forward cannot be replaced twice",
    NOTHING: "refused: nothing would be trained",
    NO_SUM: "refused: nothing sums the gradients; add shard",
}

# (on one rank, on two ranks); with and without packing alike
TILED = ("tiledmlp", "tiledblock", "tiledloss")
HELPING = (*TILED, "recompute", "shard", "compile")  # they train nothing
ADAPTING = [name for name in TECHNIQUES if name not in HELPING]
TABLE: dict[tuple[str, ...], tuple[str, str]] = {
    **{(name,): (EQUAL, NO_SUM) for name in ADAPTING},
    **{names: (NOTHING, NOTHING) for n in (1, 2) for names in combinations(HELPING, n)},
    **dict.fromkeys(combinations(ADAPTING, 2), (SAME, SAME)),
    ("lora", "lora (pissa)"): (ALONE, ALONE),
    **{(name, "shard"): (EQUAL, EQUAL) for name in ADAPTING},
    **{(name, "compile"): (EQUAL, NO_SUM) for name in ADAPTING},
    ("tiledmlp", "tiledblock"): (REPLACED, REPLACED),
    **{(name, tiled): (EQUAL, NO_SUM) for name in ADAPTING for tiled in TILED},
    **{(name, "tiledblock", "tiledloss", "recompute", "shard"): (EQUAL, EQUAL) for name in ADAPTING},
    **{(name, "recompute"): (EQUAL, NO_SUM) for name in ADAPTING},
    **{(name, "recompute", "shard"): (EQUAL, EQUAL) for name in ADAPTING},
    ("full", "recompute", "shard", "compile"): (EQUAL, EQUAL),
    **{(name, "shard", "compile"): (EQUAL, EQUAL) for name in ADAPTING},
}


def batches(packing):
    """Of one length, so that a block is compiled once; trained tokens and borders of documents differ."""
    return [packed((7, 5, 4)), packed((9, 7), seed=1)] if packing else rows(2, lengths=(16,))


def documents(packing):
    """The same tokens, each document a row of its own."""
    for batch in batches(packing):
        lengths = batch["documents"].lengths if packing else (batch["input_ids"].shape[1],)
        for ids, labels in zip(batch["input_ids"][0].split(lengths), batch["labels"][0].split(lengths)):
            yield ids[None], labels[None]


def dense_gradients(plain, packing):
    """∂W of every plain weight at `plain`, by transformers alone."""
    model = build("llama", dtype=torch.float64, attention="sdpa").train()
    model.load_state_dict(plain)
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for ids, labels in documents(packing):
        logits = model(ids, use_cache=False).logits[:, :-1]
        total = total + torch.nn.functional.cross_entropy(logits[0], labels[0, 1:], ignore_index=-100, reduction="sum")
        count += int((labels[:, 1:] != -100).sum())
    (total / count).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def lora(own, base):
    return base + 2.0 * own["B"] @ own["A"]


def adapter(own, base):
    """ΔW = B_out Z P, and its mirror."""
    Z = own["Z"]
    for end in ("out", "in"):
        values = own[f"values_{end}"]
        if f"B_{end}" in own:
            P = own[f"B_{end}"] * values
            Z = P @ Z if end == "out" else Z @ P.T
        else:
            Q, rest = own[f"Q_{end}"], own[f"rest_{end}"]
            P = rest * torch.eye(len(Q), dtype=Q.dtype) + (Q * (values - rest)) @ Q.T
            Z = P @ Z if end == "out" else Z @ P
    return base + Z


def closed(Q, X):
    return X - Q @ (Q.T @ X)


def projected(own, base):
    low = {end: closed(own[f"{end}_high"], own[f"{end}_low"]) for end in "UV"}
    return factored(own | {"U_low": low["U"], "V_low": low["V"]}, base)


def factored(own, base):
    high = (own["U_high"] * own["S_high"]) @ own["V_high"].T
    return high + (own["U_low"] * own["S_low"]) @ own["V_low"].T


# what a technique's own tensors of one weight stand for; a step of SGD on them that is not the plain one
FORMULAS = {"lora": lora, "osft (one_sided)": adapter, "osft (forward)": projected, "osft (factors)": factored}


def stepped(kind, own, name, gradient):
    if kind == "osft (factors)" and name[0] in "UV":
        held = own[f"{name[0]}_high"]
        return closed(held, own[name] - RATE * closed(held, gradient))
    return own[name] - RATE * gradient


def held_step(W, G):
    """Form update: c · P (P G P) P."""
    from treering.techniques.osft import reference as plain

    out, into = plain.protect_weights(W, min(W.shape) - int(0.4 * min(W.shape)))
    return plain.step_scale(out, into) * out @ (out @ G @ into) @ into


def reference(plain, live, kind, trainable, packing):
    """(gradients by live name, plain weights after one step of SGD). `live`: everything that the run holds."""
    dense = dense_gradients(plain, packing)
    after = dict(plain)
    if kind not in FORMULAS:
        for name in trainable:
            after[name] = plain[name] - RATE * (dense[name] if kind == "full" else held_step(plain[name], dense[name]))
        return {name: dense[name] for name in trainable}, after
    gradients = {}
    for fqn in {name.rpartition(".")[0] for name in trainable}:
        weight = f"{fqn.rpartition('.')[0]}.weight"
        own = {n.rpartition(".")[2]: v.clone() for n, v in live.items() if n.rpartition(".")[0] == fqn}
        learning = {n: own[n].requires_grad_() for n in own if f"{fqn}.{n}" in trainable}
        value = FORMULAS[kind](own, live.get(weight, torch.zeros(())))
        found = torch.autograd.grad((value * dense[weight]).sum(), list(learning.values()))
        gradients |= {f"{fqn}.{n}": g for n, g in zip(learning, found)}
        with torch.no_grad():
            new = {n: stepped(kind, own, n, g) for n, g in zip(learning, found)}
            after[weight] = FORMULAS[kind](own | new, live.get(weight, torch.zeros(())))
    return gradients, after


def cell(names, packing, folder):
    """`equal`, or why the combination was refused; a difference raises."""
    techniques = [TECHNIQUES[name] for name in names]
    try:
        run = tr.compose(build("llama", dtype=torch.float64), techniques, mesh=tr.mesh(), prepared=folder)
    except tr.PlanError as error:
        return str(error)
    with torch.no_grad():
        for name, parameter in run.trainable():
            if name.endswith(".lora_default.B"):
                parameter.fill_(0.02)  # at zero, half of the gradients would be zero and prove nothing
    live = {name: gather(value).clone() for name, value in run.plan.live().items()}
    kind = names[0].replace("lora (pissa)", "lora")
    trainable = {name for name, _ in run.trainable()}
    wanted_gradients, wanted = reference(weights(run), live, kind, trainable, packing)
    rank, ranks = data_rank(run.plan.mesh)
    optimizer = run.optimizer(torch.optim.SGD, lr=RATE)
    for ready in run.steps([batches(packing)[rank::ranks]]):
        for batch in ready:
            run.loss(batch).backward()
        assert_all_same({name: gather(p.grad) for name, p in run.trainable()}, wanted_gradients, 1e-6)
        run.step(optimizer)
    assert_all_same(weights(run), wanted, 1e-6)
    return EQUAL


def cells(slow):
    """Compiling costs seconds: with packing, where the compiled blocks are the same, and for all but the simplest
    techniques it is left to the long suite."""
    every = [(names, packing) for names in TABLE for packing in (False, True)]
    return [(names, packing) for names, packing in every if _long(names, packing) == slow]


def _long(names, packing):
    simple = ("full", "lora", "osft", *HELPING)
    single = len(names) == 2 and names[1] in (*TILED, "recompute") and names[0] != "full"  # all together: below
    return ("compile" in names and (packing or len(names) > 3)) or (len(names) > 1 and names[0] not in simple) or single


def column(folder, slow):
    """The cells of this number of ranks, one after the other in the same processes."""
    found = {}
    for names, packing in cells(slow):
        torch._dynamo.reset()  # after too many models of one class it would stop compiling, without an error
        found[names, packing] = cell(names, packing, folder)
    return found


def check(ranks, slow):
    with tempfile.TemporaryDirectory() as folder:
        for found in on_ranks(ranks, column, Path(folder), slow):
            wrong = {
                (names, "packed" if packing else "rows"): outcome
                for (names, packing), outcome in found.items()
                if (outcome != EQUAL if TABLE[names][ranks - 1] == EQUAL else TABLE[names][ranks - 1] not in outcome)
            }
            assert not wrong


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_cell_is_what_the_table_says(ranks):
    check(ranks, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_and_packed_cells_as_well(ranks):
    check(ranks, slow=True)


def test_no_cell_is_left_out():
    assert len(cells(False)) + len(cells(True)) == 2 * len(TABLE)


def test_the_table_has_every_pair():
    assert {frozenset(names) for names in TABLE} >= {frozenset(pair) for pair in combinations(TECHNIQUES, 2)}


BEFORE = """# What goes together

Every combination below was run, with rows and with packed documents. *Equal*: gradients, and the exported weights after
one step, agree to 1e-6 (relative to the largest element) with a run of transformers' own model that knows no technique.
*Refused*: `compose` raises a `PlanError` that names the settings, before any weight is read. There is no third state.

| techniques | one rank | two ranks |
|---|---|---|
"""
AFTER = """
Two adapters on one weight, or `full` beside `lora`, are refused only where they meet: give them different `targets` and
`train` patterns and they go together (`tests/plan/test_ranks_equal_one.py` trains norms beside adapters, and two
adapters on one weight that both start at zero).

Made by `python -m tests.test_composition > docs/composition.md` from the table in that file, whose every cell the tests
check. `compile` stands for the backend `aot_eager`; inductor's kernels may round differently.
"""


def table() -> str:
    lines = [f"| {' + '.join(names)} | {MEANING[one]} | {MEANING[two]} |\n" for names, (one, two) in TABLE.items()]
    return BEFORE + "".join(lines) + AFTER


def test_the_page_is_printed_from_the_table():
    page = Path(__file__).parent.parent / "docs" / "composition.md"
    assert page.read_text(encoding="utf-8") == table(), "run: python -m tests.test_composition > docs/composition.md"


if __name__ == "__main__":
    print(table(), end="")
