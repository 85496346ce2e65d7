"""Maps: exact where nothing is left out, better the more is kept, and refused where they would mean nothing."""

import math

import pytest
import torch

from tests.same import assert_same
from tests.sketches.toy import SHAPES, basis, modules, normal, sums
from treering import CheckpointError, ConfigError
from treering.sketches import reference
from treering.sketches.maps import SideBasis, inverse_root, module_map
from treering.sketches.recipe import recipe_of
from treering.sketches.rows import TokenSpans
from treering.sketches.settings import SketchSettings

LENGTHS = [10, 30, 3, 17, 25, 5]
SPANS = TokenSpans.of_lengths(LENGTHS)


def gradients(of):
    return {n: reference.gradients(m.a, m.g, SPANS, len(LENGTHS)) for n, m in of.items()}


def exact_scores(of, damping, joint, corrected=False):
    """Σ_modules ⟨G, H⁻¹ G⟩ of every pair of documents, with the damping of the sides or of their products."""
    total = 0
    for name, G in gradients(of).items():
        module = of[name]
        if corrected:
            (_, QS), (_, QA) = torch.linalg.eigh(module.S), torch.linalg.eigh(module.A)
            rotated = QS.T @ G @ QA
            values = module.corrected.double()
            solved = (QS @ (rotated / (values + damping * values.mean())) @ QA.T).flatten(1)
        elif joint:
            solved = G.flatten(1) @ reference.dense_power(module.A, module.S, damping, -1)
        else:
            solved = (reference.power(module.S, damping, -1) @ G @ reference.power(module.A, damping, -1)).flatten(1)
        total = total + G.flatten(1) @ solved.T
    return total


@pytest.mark.parametrize("curvature", ["kfac", "tkfac", "shampoo"])
def test_psift_that_keeps_all_is_exact(curvature):
    made = modules()
    rows = sums(made, SketchSettings(kind="psift", curvature=curvature, size=24), SPANS, len(LENGTHS)).documents_rows()
    assert_same(reference.scores(rows, rows), exact_scores(made, 0.1, joint=False), 1e-5)


@pytest.mark.parametrize("corrected", [False, True])
def test_all_coordinates_of_the_eigenbasis_are_exact(corrected):
    made = modules()
    settings = SketchSettings(curvature="ekfac" if corrected else "kfac")
    rows = sums(made, settings, SPANS, len(LENGTHS)).documents_rows()
    assert_same(reference.scores(rows, rows), exact_scores(made, 0.1, joint=True, corrected=corrected), 1e-5)


@pytest.mark.parametrize("corrected", [False, True])
def test_of_exact_the_query_is_multiplied_by_the_inverse(corrected):
    made = modules()
    group = sums(made, SketchSettings(kind="exact", curvature="ekfac" if corrected else "kfac"), SPANS, len(LENGTHS))
    found = reference.scores(group.documents_rows(), group.query_rows())
    assert_same(found, exact_scores(made, 0.1, joint=True, corrected=corrected), 1e-5)
    for name, G in gradients(made).items():
        assert_same(group.documents_rows()[name], G.flatten(1), 1e-6)


def test_the_inverse_root_twice_is_the_inverse():
    A = modules()["model.layers.0.up.weight"].A
    side = basis(A)
    root = side.vectors @ torch.diag(inverse_root("m", "inputs", side, 0.1)) @ side.vectors.T
    assert_same(root @ root @ reference.power(A, 0.1, 1), torch.eye(len(A)).double(), 1e-9)


def test_much_damping_leaves_the_product_of_gradients():
    made = modules()
    rows = sums(made, SketchSettings(kind="eigen-topk", curvature="kfac", damping=1e5), SPANS, 6).documents_rows()
    for name, G in gradients(made).items():
        plain = G.flatten(1) @ G.flatten(1).T
        found = (rows[name] @ rows[name].T).double()
        assert_same(found / found[0, 0], plain / plain[0, 0], 1e-4, name)


@pytest.mark.parametrize("kind", ["psift", "eigen-topk"])
def test_the_scale_of_the_loss_does_not_change_scores(kind):
    """Scores are G · H⁻¹ G, and damping is relative to the eigenvalues."""
    made, settings = modules(), SketchSettings(kind=kind, curvature="kfac", size=5)
    larger = {n: type(m)(name=n, a=m.a, g=1000 * m.g, corrected=m.corrected) for n, m in made.items()}
    one, other = (sums(of, settings, SPANS, 6).documents_rows() for of in (made, larger))
    assert_same(reference.scores(other, other), reference.scores(one, one), 1e-5)


@pytest.mark.parametrize("number", [400, pytest.param(3000, marks=pytest.mark.slow)])
def test_sketches_of_both_sides_are_unbiased_with_one_constant_for_all_shapes(number):
    made = modules(40)
    spans = TokenSpans.of_lengths([25, 15])
    G = {n: reference.gradients(m.a, m.g, spans, 2) for n, m in made.items()}
    wanted = {name: float((both[0] * both[1]).sum()) for name, both in G.items()}
    draws = {name: [] for name in made}
    for seed in range(number):
        settings = SketchSettings(kind="psift", curvature="identity", size=4, seed=seed)
        for name, rows in sums(made, settings, spans, 2).documents_rows().items():
            draws[name].append(float(rows[0] @ rows[1]))
    for name, found in draws.items():
        values = torch.tensor(found, dtype=torch.float64)
        error = abs(values.mean() - wanted[name]) / (values.std() / math.sqrt(len(values)))
        assert error < 4, f"{name} {SHAPES[name]}: {float(error):.1f} sigma away"


def test_the_more_is_kept_the_closer():
    made = modules(200, {f"m{i}": (40, 40) for i in range(2)})
    spans = TokenSpans.of_lengths([10] * 20)
    whole = None
    errors = []
    for size in (40, 20, 8, 3):
        squared = []
        for seed in range(4):
            settings = SketchSettings(kind="psift", curvature="kfac", size=size, seed=seed)
            rows = sums(made, settings, spans, 20).documents_rows()
            found = reference.scores(rows, rows)
            whole = found if whole is None else whole
            squared.append(float((found - whole).square().mean()))
        errors.append(sum(squared))
    assert errors == sorted(errors) and errors[0] < 1e-6 * errors[1], errors


def test_a_side_that_is_small_is_not_projected():
    mapped = modules()["model.layers.0.A"].map(SketchSettings(kind="psift", curvature="kfac", size=5))
    assert (mapped.rows, mapped.columns) == (3, 5)
    plain = module_map(SketchSettings(kind="psift", curvature="identity", size=5), "A", 3, 12)
    assert plain.left is None and plain.right.shape == (5, 12)
    assert plain.numbers == 15


def test_the_size_of_a_row_follows_from_the_smaller_sides():
    """Of LoRA's A [3, 12] and B [24, 3] the rank side is kept as it is."""
    settings = SketchSettings(kind="psift", curvature="identity", size=5)
    maps = [module_map(settings, name, N, M) for name, N, M in (("A", 3, 12), ("B", 24, 3), ("W", 24, 12))]
    recipe = recipe_of(maps, settings, model="m")
    assert [m.numbers for m in recipe.modules] == [15, 15, 25]
    assert recipe.bytes_of_row == 15 + 15 + 25 + 3 * 2


def test_a_block_keeps_the_leading_eigenvectors():
    module = modules()["model.layers.0.up.weight"]
    settings = SketchSettings(curvature="ekfac", block=7)
    mapped, whole = module.map(settings), module.map(SketchSettings(curvature="ekfac"))
    assert (mapped.rows, mapped.columns) == (7, 7)
    sums_ = normal(2, *module.shape).double()
    rotated = whole.document(whole.left.double() @ sums_ @ whole.right.double().T).unflatten(1, module.shape)
    found = mapped.document(mapped.left.double() @ sums_ @ mapped.right.double().T).unflatten(1, (7, 7))
    assert_same(found, rotated[:, -7:, -7:], 1e-6)
    bases = {"input_basis": basis(module.A), "gradient_basis": basis(module.S)}
    corner = module.corrected[-7:, -7:]
    same = module_map(settings, "m", *module.shape, **bases, corrected=corner, mean=float(module.corrected.mean()))
    assert_same(same.weights, mapped.weights, 1e-6)
    with pytest.raises(CheckpointError, match="same block"):
        module_map(settings, "m", *module.shape, **bases, corrected=corner)


def test_a_diagonal_side_is_a_basis_whose_vectors_are_ones():
    values = torch.tensor([0.3, 0.1, 0.7]).double()
    diagonal, same = SideBasis(values=values), basis(torch.diag(values))
    for settings in (
        SketchSettings(kind="psift", curvature="kfac", size=2),
        SketchSettings(kind="psift", curvature="kfac", size=3),
        SketchSettings(kind="exact", curvature="kfac"),
    ):
        G = normal(1, 3, 3).double()
        one, two = (module_map(settings, "m", 3, 3, input_basis=side, gradient_basis=same) for side in (diagonal, same))
        if settings.kind == "exact":
            assert_same(one.query(G), two.query(G), 1e-6)
        else:
            assert_same(one.right, two.right, 1e-6)
    assert torch.equal(diagonal.leading(2), torch.tensor([[1.0, 0], [0, 0], [0, 1]]).double())


def test_what_cannot_be_used_is_refused_by_its_name():
    module = modules()["model.layers.0.up.weight"]
    with pytest.raises(CheckpointError, match="q has no eigenbases"):
        module_map(SketchSettings(), "q", 3, 4)
    whole = {"input_basis": basis(module.A), "gradient_basis": basis(module.S)}
    with pytest.raises(CheckpointError, match="q has no corrected eigenvalues"):
        module_map(SketchSettings(), "q", 24, 12, **whole)
    with pytest.raises(CheckpointError, match="another model"):
        module_map(SketchSettings(curvature="kfac"), "q", 24, 13, **whole)
    nothing = basis(torch.zeros(12, 12).double())
    with pytest.raises(CheckpointError, match=r"q, inputs: .*nothing reached it"):
        module_map(
            SketchSettings(kind="psift", curvature="kfac"),
            "q", 24, 12, input_basis=nothing, gradient_basis=whole["gradient_basis"],
        )  # fmt: skip
    singular = basis(torch.diag(torch.tensor([0.0, 1.0])).double())
    for kind in ("psift", "eigen-topk", "exact"):
        with pytest.raises(CheckpointError, match="damping is 0"):
            module_map(
                SketchSettings(kind=kind, curvature="kfac", damping=0),
                "q", 2, 2, input_basis=singular, gradient_basis=singular,
            )  # fmt: skip
    broken = SideBasis(values=torch.tensor([1.0, torch.nan]), vectors=torch.eye(2))
    with pytest.raises(CheckpointError, match="not all finite"):
        module_map(SketchSettings(curvature="kfac"), "q", 2, 2, input_basis=broken, gradient_basis=broken)


@pytest.mark.parametrize(
    ("given", "field", "message"),
    [
        ({"kind": "psift"}, "curvature", "use kind: eigen-topk"),
        ({"kind": "eigen-topk", "curvature": "identity"}, "curvature", "whitens nothing"),
        ({"kind": "psift", "curvature": "kfac", "storage": "int4"}, "storage", "int4 is for kind: exact"),
        ({"storage": "float32"}, "storage", "stores its values as int8"),
        ({"kind": "trak"}, "kind", "psift, eigen-topk, exact"),
        ({"size": 0}, "size", "from 1"),
        ({"entries": True}, "entries", "from 1"),
        ({"block": -1}, "block", "from 1"),
        ({"damping": -0.1}, "damping", "from 0"),
        ({"damping": float("nan")}, "damping", "from 0"),
        ({"damping": True}, "damping", "from 0"),
        ({"seed": 1.5}, "seed", "whole number"),
        ({"restore_norm": 1}, "restore_norm", "true or false"),
    ],
)
def test_settings_that_contradict_are_refused(given, field, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        SketchSettings(**given)
    assert refusal.value.field == field
