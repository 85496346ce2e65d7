"""Every pair of techniques is numerically equal to the plain reference, or refused. There is no third state.

`python -m tests.test_composition > docs/composition.md` prints the table below as a page.

A column may also be an objective with a teacher, which is a folder or the model itself (`base`).

The reference knows no technique: transformers' own model with the weights that the run holds, each document a row of
its own, one backward over the whole global batch. The gradients of what a technique trains instead of a weight W follow
from that of W: they are those of ⟨∂W, W(x)⟩, with W(x) the technique's formula, a line each in `FORMULAS`. One step of
SGD by hand then gives the weights that the run must export.
"""

import re
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch

import treering as tr
from tests.ranks import PATIENCE, on_ranks
from tests.same import assert_all_same
from tests.techniques.osft.measured import moments
from tests.toy import packed, rows, weights
from tests.zoo import build
from treering.core.sharded import gather
from treering.core.topology import data_rank
from treering.formats import named
from treering.objectives import reference as plain_truth
from treering.techniques.shard.units import SHARDS_CODES

RATE = 0.3
MODELS = ("llama", "qwen3_moe")
LAYOUTS = ("rows", "packed")
WEIGHTS = ("q_proj", "down_proj")  # the second is a stack of experts in qwen3_moe


def techniques(model, folder="unused"):
    return {
        "full": tr.Full(),
        "lora": tr.LoRA(targets=WEIGHTS, rank=4, alpha=8.0, dtype="float64"),
        "lora (pissa)": tr.LoRA(name="pissa", targets=WEIGHTS, rank=4, alpha=8.0, dtype="float64", init="pissa"),
        "osft": tr.OSFT(protect="weights", ratio=0.4, targets=WEIGHTS),
        "osft (merged)": tr.OSFT(targets=WEIGHTS),
        "osft (one_sided)": tr.OSFT(protect="weights", ratio=0.4, targets=WEIGHTS, form="one_sided"),
        "osft (forward)": tr.OSFT(protect="weights", ratio=0.4, targets=WEIGHTS, form="forward"),
        "osft (factors)": tr.OSFT(protect="weights", ratio=0.4, targets=WEIGHTS, form="factors"),
        "quantize": tr.Quantize(format="int8", targets=WEIGHTS),
        # not int8: there the largest element of a row lies between two codes, and rounding decides
        "quantize (fake)": tr.Quantize(format="fp8", targets=WEIGHTS, storage="fake"),
        "tiledmlp": tr.TiledMLP(tile=5),
        "tiledblock": tr.TiledBlock(tile=5),
        "tiledloss": tr.TiledLoss(tile=5),
        "recompute": tr.Recompute(offload="cpu"),
        "ulysses": tr.Ulysses(),
        "shard": tr.Shard(),
        "compile": tr.Compile(backend="aot_eager"),
        "collect": tr.Collect(to=str(folder), kind="exact", curvature="identity"),
    }


TECHNIQUES = tuple(techniques("llama"))
TAUGHT = {"distill": "folder", "distill (base)": "base"}  # objectives, by their teacher
HOW = {"temperature": 2.0, "mix": 0.25}
EQUAL = "equal"
SAME = "decide what happens to the gradient of"
ALONE = "one of them must be alone in that"
REPLACED = "both replace the forward"
NOTHING = "nothing would be trained"
NO_SUM = "no technique sums their gradients"
NEEDS = "needs the plain weight"
STORED = "both own how the weight is stored"
VALUES = "to multiply with its own values"
NO_COPY = "base, and {} trains weights"
FEW_BITS = "base, and quantize keeps weights in few bits"
FACTORS = "factors that are not assigned to ranks"
UNSEEN = "trains in a way that its gradient can be seen"
UNTOLD = "so that rows of other ranks' documents reach them"
CODES = "cannot shard the codes of packed weights"  # by torch 2.11
MEANING = {
    EQUAL: "equal",
    SAME: "refused: one weight cannot be trained twice",
    ALONE: "refused: a start that moves the base must be alone on it",
    REPLACED: "refused: one forward cannot be replaced twice",
    NOTHING: "refused: nothing would be trained",
    NO_SUM: "refused: nothing sums the gradients; add shard",
    NEEDS: "refused: the plain weight is needed, and only codes are stored",
    STORED: "refused: one weight cannot be stored in two forms",
    VALUES: "refused: what it trains must be what multiplies",
    **{NO_COPY.format(name): "refused: the base is not kept; name its folder" for name in ("full", "lora", "osft")},
    FEW_BITS: "refused: the base is not kept; name its folder",
    UNSEEN: "refused: its gradient is not seen; leave collect out",
    UNTOLD: "refused: gradients of assigned experts cannot be separated",
    FACTORS: "refused: experts from factors are not assigned to ranks",
}

# (on one rank, on two ranks); with and without packing alike
TILED = ("tiledmlp", "tiledblock", "tiledloss")
FAKE = "quantize (fake)"
HELPING = ("quantize", FAKE, *TILED, "recompute", "ulysses", "shard", "compile", "collect")  # they train nothing
ADAPTING = [name for name in TECHNIQUES if name not in HELPING]
FACTORED = ("osft (forward)", "osft (factors)")
SEEN = ("full", "lora", "lora (pissa)", "osft", "osft (merged)", "osft (one_sided)")  # by `collect`
TABLE: dict[tuple[str, ...], tuple[str, str]] = {
    **{(name,): (EQUAL, NO_SUM) for name in ADAPTING},
    **{names: (NOTHING, NOTHING) for n in (1, 2) for names in combinations(HELPING, n)},
    **dict.fromkeys(combinations(ADAPTING, 2), (SAME, SAME)),
    ("lora", "lora (pissa)"): (ALONE, ALONE),
    **{(name, "quantize"): (NEEDS, NEEDS) for name in ("full", "lora (pissa)", "osft", "osft (merged)")},
    **{(name, "quantize"): (STORED, STORED) for name in FACTORED},
    **{(name, "quantize"): (EQUAL, NO_SUM) for name in ("lora", "osft (one_sided)")},
    **{(name, FAKE): (EQUAL, NO_SUM) for name in ("full", "lora", "osft (one_sided)")},
    **{(name, FAKE): (VALUES, VALUES) for name in ("lora (pissa)", "osft", "osft (merged)", *FACTORED)},
    **{(name, FAKE, "shard"): (EQUAL, EQUAL) for name in ("full", "lora")},
    **{(name, FAKE, "tiledblock", "tiledloss", "recompute", "shard"): (EQUAL, EQUAL) for name in ("full", "lora")},
    **{("lora", "quantize", other, "shard"): (EQUAL, EQUAL) for other in (*TILED, "recompute")},
    ("lora", "quantize", "shard"): (EQUAL, EQUAL),
    ("lora", "quantize", "shard", "compile"): (EQUAL, EQUAL),
    ("lora", "quantize", "tiledblock", "tiledloss", "recompute", "shard"): (EQUAL, EQUAL),
    **{(name, "shard"): (EQUAL, EQUAL) for name in ADAPTING},
    **{(name, "compile"): (EQUAL, NO_SUM) for name in ADAPTING},
    ("tiledmlp", "tiledblock"): (REPLACED, REPLACED),
    **{(name, tiled): (EQUAL, NO_SUM) for name in ADAPTING for tiled in TILED},
    **{(name, "tiledblock", "tiledloss", "recompute", "shard"): (EQUAL, EQUAL) for name in ADAPTING},
    **{(name, "tiledmlp", "tiledloss", "recompute", "shard"): (EQUAL, EQUAL) for name in ADAPTING},
    **{(name, "tiledloss", "recompute", "shard"): (EQUAL, EQUAL) for name in ADAPTING},
    **{(name, "recompute"): (EQUAL, NO_SUM) for name in ADAPTING},
    **{(name, "ulysses"): (EQUAL, NO_SUM) for name in ADAPTING},
    **{(name, "recompute", "shard"): (EQUAL, EQUAL) for name in ADAPTING},
    ("full", "recompute", "shard", "compile"): (EQUAL, EQUAL),
    **{(name, "distill"): (EQUAL, NO_SUM) for name in ADAPTING},
    **{(name, "tiledloss", "shard", "distill"): (EQUAL, EQUAL) for name in ("full", "lora", "osft (one_sided)")},
    ("lora", "quantize", "shard", "distill"): (EQUAL, EQUAL),
    ("lora", "quantize", "tiledblock", "tiledloss", "recompute", "shard", "distill"): (EQUAL, EQUAL),
    ("lora", "distill (base)"): (EQUAL, NO_SUM),
    ("osft (one_sided)", "distill (base)"): (EQUAL, NO_SUM),
    ("lora", "shard", "distill (base)"): (EQUAL, EQUAL),
    ("lora", "tiledblock", "tiledloss", "recompute", "shard", "distill (base)"): (EQUAL, EQUAL),
    ("lora", "quantize", "distill (base)"): (FEW_BITS, NO_SUM),
    ("lora (pissa)", "distill (base)"): (NO_COPY.format("lora"), NO_SUM),
    **{(name, "distill (base)"): (NO_COPY.format(name), NO_SUM) for name in ("full", "osft")},
    ("osft (merged)", "distill (base)"): (NO_COPY.format("osft"), NO_SUM),
    **{(name, "shard", "compile"): (EQUAL, EQUAL) for name in ADAPTING},
    **{(name, "collect"): (UNSEEN if name in FACTORED else EQUAL, NO_SUM) for name in ADAPTING},
    **{(name, "shard", "collect"): (EQUAL, EQUAL) for name in SEEN},
    **{(name, "tiledblock", "tiledloss", "recompute", "shard", "collect"): (EQUAL, EQUAL) for name in SEEN},
    ("lora", "quantize", "shard", "collect"): (EQUAL, EQUAL),
}
# Where a model differs. Weights of experts are made of factors in the forward that tiles would replace.
DIFFERENT: dict[str, dict[tuple[str, ...], tuple[str, str]]] = {
    "llama": {},
    "qwen3_moe": {
        names: (REPLACED, REPLACED)
        for names in TABLE
        if {*FACTORED} & set(names) and {"tiledmlp", "tiledblock"} & set(names)
    },
}


# Two ranks that have half of the experts each, or half of each row (with `ulysses` next to the others), or both: as two
# ranks with rows of their own, but for factors of experts.
ASSIGNED, SHARED, BOTH = "assigned", "shared", "assigned and shared"
MESHES = {
    1: {},
    2: {},
    ASSIGNED: {"expert": 2},
    SHARED: {"shard": 1, "sequence": 2},
    BOTH: {"shard": 1, "sequence": 2, "expert": 2},
}
MODELS_OF = {ASSIGNED: ("qwen3_moe",), SHARED: ("llama",), BOTH: ("qwen3_moe",)}


def written(names, model, ranks):
    if ranks in (ASSIGNED, BOTH) and {*FACTORED} & set(names):
        return FACTORS
    if ranks in (ASSIGNED, BOTH) and "collect" in names and written(names, model, 2) == EQUAL:
        return UNTOLD
    if ranks in MODELS_OF:
        return written(names, model, 2)
    return DIFFERENT[model].get(names, TABLE[names])[ranks - 1]


def outcome(names, model, ranks):
    """What the table says of a combination, and torch 2.11 of some."""
    said = written(names, model, ranks)
    return CODES if said == EQUAL and {"quantize", "shard"} <= set(names) and not SHARDS_CODES else said


def batches(layout):
    """Of one length, so that a block is compiled once; trained tokens and borders of documents differ."""
    return [packed((7, 5, 4)), packed((9, 7), seed=1)] if layout == "packed" else rows(2, lengths=(16,))


def documents(layout):
    """The same tokens, each document a row of its own."""
    for batch in batches(layout):
        lengths = batch["documents"].lengths if layout == "packed" else (batch["input_ids"].shape[1],)
        for ids, labels in zip(batch["input_ids"][0].split(lengths), batch["labels"][0].split(lengths)):
            yield ids[None], labels[None]


def teacher(name, by):
    """A dense model, or what the run begins with."""
    arch, seed = ("llama", 5) if by == "folder" else (name, 0)
    return build(arch, seed=seed, dtype=torch.float64, attention="sdpa")


def dense_gradients(name, plain, layout, taught):
    """∂W of every plain weight at `plain`, by transformers alone."""
    model = build(name, dtype=torch.float64, attention="sdpa").train()
    model.load_state_dict(plain)
    teaching = teacher(name, taught) if taught else None
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for ids, labels in documents(layout):
        logits = model(ids, use_cache=False).logits[:, :-1]
        targets = labels[0, 1:]
        if teaching is None:
            summed = torch.nn.functional.cross_entropy(logits[0], targets, ignore_index=-100, reduction="sum")
        else:
            by = teaching(ids, use_cache=False).logits[0, :-1]
            summed = plain_truth.distill(logits[0], by, targets, tr.Distill(teacher=taught, **HOW))
        total = total + summed
        count += int((labels[:, 1:] != -100).sum())
    (total / count).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def lora(own, base):
    return base + 2.0 * own["B"] @ own["A"]


def adapter(own, base):
    """ΔW = B_out Z P, and its mirror."""
    Z = own["Z"]
    for end in ("out", "in"):
        values = own[f"values_{end}"][..., None, :]
        if f"B_{end}" in own:
            P = own[f"B_{end}"] * values
            Z = P @ Z if end == "out" else Z @ P.mT
        else:
            Q, rest = own[f"Q_{end}"], own[f"rest_{end}"][..., None]
            P = rest * torch.eye(Q.shape[-2], dtype=Q.dtype) + (Q * (values - rest)) @ Q.mT
            Z = P @ Z if end == "out" else Z @ P
    return base + Z


def closed(Q, X):
    return X - Q @ (Q.mT @ X)


def projected(own, base):
    low = {end: closed(own[f"{end}_high"], own[f"{end}_low"]) for end in "UV"}
    return factored(own | {"U_low": low["U"], "V_low": low["V"]}, base)


def factored(own, base):
    U_high, U_low = (own[f"U_{end}"] * own[f"S_{end}"].unsqueeze(-2) for end in ("high", "low"))
    return U_high @ own["V_high"].mT + U_low @ own["V_low"].mT


def merged(own, base):
    """ΔW = Z Bᵀ, from Z = 0; the base of later steps has it."""
    return base + own["Z"] @ own["B"].mT


# what a technique's own tensors of one weight stand for; a step of SGD on them that is not the plain one
FORMULAS = {
    "lora": lora,
    "osft (merged)": merged,
    "osft (one_sided)": adapter,
    "osft (forward)": projected,
    "osft (factors)": factored,
}


def stepped(kind, own, name, gradient):
    if kind == "osft (factors)" and name[0] in "UV":
        held = own[f"{name[0]}_high"]
        return closed(held, own[name] - RATE * closed(held, gradient))
    return own[name] - RATE * gradient


def held_step(W, G):
    """Form update: c · P (P G P) P."""
    from treering.techniques.osft import reference as plain

    if W.ndim == 3:  # experts, each for itself
        return torch.stack([held_step(*expert) for expert in zip(W, G)])
    out, into = plain.protect_weights(W, min(W.shape) - int(0.4 * min(W.shape)))
    return plain.step_scale(out, into) * out @ (out @ G @ into) @ into


def rounded(W):
    """Return Q(W) as `quantize (fake)` multiplies with it."""
    form = named("fp8", scale_dtype="float64")
    return form.decode(form.encode(W), W.shape[-1], W.dtype)


def weight_of(fqn):
    """The plain weight that the technique's module `fqn` stands for: a linear's, or one stack of experts."""
    parent, _, child = fqn.rpartition(".")
    stack = re.fullmatch(r"(?:osft|lora_default|lora_pissa)_(\w+)", child)
    return f"{parent}.{stack[1] if stack else 'weight'}"


def reference(model, plain, live, kind, trainable, layout, taught, fake):
    """(gradients by live name, plain weights after one step of SGD). `live`: everything that the run holds; of weights
    in `fake` it holds W, where `plain` is Q(W)."""
    dense = dense_gradients(model, plain, layout, taught)
    after = dict(plain)
    if kind not in FORMULAS:
        for name in trainable:
            step = RATE * (dense[name] if kind == "full" else held_step(plain[name], dense[name]))
            after[name] = rounded(live[name] - step) if name in fake else plain[name] - step
        return {name: dense[name] for name in trainable}, after
    gradients = {}
    for fqn in {name.rpartition(".")[0] for name in trainable}:
        weight = weight_of(fqn)
        own = {n.rpartition(".")[2]: v.clone() for n, v in live.items() if n.rpartition(".")[0] == fqn}
        learning = {n: own[n].requires_grad_() for n in own if f"{fqn}.{n}" in trainable}
        # The base of an adapter may be codes: it is what is left of the plain weight without the adapter.
        base = live.get(weight, torch.zeros(()))
        if (weight not in live and kind not in FACTORED) or weight in fake:
            base = plain[weight] - FORMULAS[kind](own, 0).detach()
        value = FORMULAS[kind](own, base)
        of_own = torch.autograd.grad((value * dense[weight]).sum(), list(learning.values()))
        gradients |= {f"{fqn}.{n}": g for n, g in zip(learning, of_own)}
        with torch.no_grad():
            new = {n: stepped(kind, own, n, g) for n, g in zip(learning, of_own)}
            after[weight] = FORMULAS[kind](own | new, base)
    return gradients, after


@cache
def mesh(ranks):
    """One for all cells: each mesh starts threads for its process groups, which end with the process."""
    return tr.mesh(**MESHES[ranks])


def objective(taught, folder):
    """None, or distillation; `check` writes the folder of the teacher."""
    path = str(Path(folder) / "teacher") if taught == "folder" else taught
    return path and tr.Distill(teacher=path, **HOW)


def result(names, model, layout, ranks, folder):
    """`equal`, or why the combination was refused; a difference raises."""
    known = techniques(model, Path(folder) / " ".join((*names, model, layout, str(ranks))))
    adds = ("ulysses",) if ranks in (SHARED, BOTH) and "ulysses" not in names else ()
    taught = next((TAUGHT[name] for name in names if name in TAUGHT), None)
    built = build(model, dtype=torch.float64)
    measured = moments(built, known["osft (merged)"]) if "osft (merged)" in names else None
    try:
        run = tr.compose(
            built,
            [known[name] for name in (*names, *adds) if name not in TAUGHT],
            mesh=mesh(ranks),
            prepared=folder,
            statistics=measured,
            objective=objective(taught, folder),
        )
    except tr.PlanError as error:
        return str(error)
    with torch.no_grad():
        for name, parameter in run.trainable():
            if ".lora_default" in name and name.endswith(".B"):
                parameter.fill_(0.02)  # at zero, half of the gradients would be zero and prove nothing
    live = {name: gather(value).clone() for name, value in run.plan.live().items()}
    kind = names[0].replace("lora (pissa)", "lora")
    trainable = {name for name, _ in run.trainable()}
    fake = {name for name in run.plan.plain if FAKE in names and name.rpartition(".weight")[0].endswith(WEIGHTS)}
    fake |= {name for name in run.plan.plain if FAKE in names and name.endswith("experts.down_proj")}
    wanted_gradients, wanted = reference(model, weights(run), live, kind, trainable, layout, taught, fake)
    rank, several = data_rank(run.plan.mesh)
    optimizer = run.optimizer(torch.optim.SGD, lr=RATE)
    for ready in run.steps([batches(layout)[rank::several]]):
        for batch in ready:
            run.loss(batch).backward()
        assert_all_same({name: gather(p.grad) for name, p in run.trainable()}, wanted_gradients, 1e-6)
        run.step(optimizer)
    assert_all_same(weights(run), wanted, 1e-6)
    return EQUAL


Cell = tuple[tuple[str, ...], str, str]  # techniques, model, layout
CELLS: list[Cell] = [(names, model, layout) for names in TABLE for model in MODELS for layout in LAYOUTS]
Ranks = int | str  # a key of MESHES


def cells_of(ranks: Ranks) -> list[Cell]:
    return [cell for cell in CELLS if cell[1] in MODELS_OF.get(ranks, MODELS)]


def pairs(cell: Cell, ranks: Ranks) -> set[tuple[str, ...]]:
    """What a cell shows: an outcome for each two of its techniques, its model and its layout."""
    names, model, layout = cell
    return {(outcome(names, model, ranks), *pair) for pair in combinations((*names, model, layout), 2)}


def cost(cell: Cell, ranks: Ranks) -> float:
    """About, in hundredths of a second of one rank: a refusal 1, a step 10, compiling 400; experts cost more."""
    names, model, _ = cell
    if outcome(names, model, ranks) != EQUAL:
        return 1
    factor = 1.3 if model == "qwen3_moe" else 1
    return factor * (400 if "compile" in names else 3 * len(names))


def is_long(cell: Cell, ranks: Ranks) -> bool:
    """Compiling costs seconds a cell: the default suite does it for three techniques of a dense model on one rank, and
    for one on several."""
    names, model, _ = cell
    compiled = "compile" in names and outcome(names, model, ranks) == EQUAL
    return compiled and (names[0] not in ("full", "lora", "osft")[: 3 if ranks == 1 else 1] or model != "llama")


@cache
def covering(ranks: Ranks) -> tuple[Cell, ...]:
    """A covering array: of the cells that are not long, some in which every pair occurs that occurs in any of them,
    chosen one after the other by how many new pairs they show for their cost."""
    short = [cell for cell in cells_of(ranks) if not is_long(cell, ranks)]
    missing = set().union(*(pairs(cell, ranks) for cell in short))
    chosen: list[Cell] = []
    while missing:
        chosen.append(max(short, key=lambda cell: len(missing & pairs(cell, ranks)) / cost(cell, ranks)))
        missing -= pairs(chosen[-1], ranks)
    return tuple(chosen)


def column(cells, ranks, folder):
    """Outcomes of the cells, one after the other in the same processes: ranks are started once for all of them."""
    outcomes = {}
    for cell in cells:
        torch._dynamo.reset()  # after too many models of one class it would stop compiling, without an error
        try:
            outcomes[cell] = result(*cell, ranks, folder)
        except AssertionError as error:
            raise AssertionError(f"{' + '.join(cell[0])} on {cell[1]}, {cell[2]}: {error}") from error
    return outcomes


def check(cells, ranks, folder):
    teacher("llama", "folder").save_pretrained(Path(folder) / "teacher")
    world = 2 if ranks in MODELS_OF else ranks
    for outcomes in on_ranks(world, column, cells, ranks, folder, timeout=2 * PATIENCE + 2 * len(cells)):
        wrong = {
            cell: shown
            for cell, shown in outcomes.items()
            if (shown != EQUAL if outcome(*cell[:2], ranks) == EQUAL else outcome(*cell[:2], ranks) not in shown)
        }
        assert not wrong


# What assigned experts alone show, they show with shared rows as well.
@pytest.mark.parametrize("ranks", [pytest.param(r, marks=pytest.mark.slow) if r == ASSIGNED else r for r in MESHES])
def test_cells_with_every_pair_are_what_the_table_says(ranks, tmp_path):
    check(covering(ranks), ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", MESHES)
def test_all_other_cells_are_what_the_table_says(ranks, tmp_path):
    check([cell for cell in cells_of(ranks) if cell not in covering(ranks)], ranks, tmp_path)


@pytest.mark.parametrize("ranks", MESHES)
def test_the_default_cells_show_every_pair(ranks):
    seen = set().union(*(pairs(cell, ranks) for cell in covering(ranks)))
    for cell in cells_of(ranks):
        assert is_long(cell, ranks) or pairs(cell, ranks) <= seen, cell
    assert len(covering(ranks)) < len(cells_of(ranks)) / (2 if ranks in MODELS_OF else 4)


def test_the_table_has_every_pair():
    assert {frozenset(names) for names in TABLE} >= {frozenset(pair) for pair in combinations(TECHNIQUES, 2)}


BEFORE = """# What goes together

Every combination below was run on a dense model (llama) and on one with experts (qwen3_moe), with rows and with packed
documents, on one rank and on two; on two ranks that share their rows (`sequence: 2`, with `ulysses` next to what is
named); of qwen3_moe also on two ranks that have half of the experts each (`expert: 2`), with rows of their own and
sharing them.
*Equal*: gradients, and the exported weights after one step, agree to 1e-6 (relative
to the largest element) with a run of transformers' own model that knows no technique. *Refused*: `compose` raises a
`PlanError` that names the settings, before any weight is read. There is no third state.

`distill` is the objective with a teacher that is a dense model's folder, at temperature 2 and a quarter of
cross-entropy; in `distill (base)` the model teaches itself what it gives without its adapters.

Targets are `q_proj` and `down_proj`, which in qwen3_moe is a stack of experts. `quantize` stores int8 codes; with
`quantize (fake)` plain weights multiply as fp8 would hold them.

"""
AFTER = """
Two adapters on one weight, or `full` and `lora`, are refused only where they meet: give them different `targets` and
`train` patterns and they go together (`tests/plan/test_ranks_equal_one.py` trains norms and adapters, and two
adapters on one weight that both start at zero).

Made by `python -m tests.test_composition > docs/composition.md` from the table in that file. `make test` runs cells in
which every two of its techniques, models and layouts meet, with every outcome that they have (`compile` only with
`full`, `lora` and `osft` on llama, with `full` on several ranks); `make test-all` runs all. `compile` stands for the
backend `aot_eager`; inductor's kernels may round differently.
"""


COLUMNS = {
    "llama, one rank": ("llama", 1),
    "llama, two ranks": ("llama", 2),
    "llama, sequence: 2": ("llama", SHARED),
    "qwen3_moe, one rank": ("qwen3_moe", 1),
    "qwen3_moe, two ranks": ("qwen3_moe", 2),
    "qwen3_moe, expert: 2": ("qwen3_moe", ASSIGNED),
    "qwen3_moe, sequence: 2, expert: 2": ("qwen3_moe", BOTH),
}


def table() -> str:
    head = f"| techniques | {' | '.join(COLUMNS)} |\n{'|---' * (1 + len(COLUMNS))}|\n"
    cells = {names: [written(names, model, ranks) for model, ranks in COLUMNS.values()] for names in TABLE}
    lines = [f"| {' + '.join(names)} | {' | '.join(map(MEANING.get, row))} |\n" for names, row in cells.items()]
    return BEFORE + head + "".join(lines) + AFTER


def test_the_page_is_printed_from_the_table():
    page = Path(__file__).parent.parent / "docs" / "composition.md"
    assert page.read_text(encoding="utf-8") == table(), "run: python -m tests.test_composition > docs/composition.md"


if __name__ == "__main__":
    print(table(), end="")
