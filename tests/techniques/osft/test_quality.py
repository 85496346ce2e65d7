"""Protection earns its place: at equal learning, what it leaves of earlier tasks, beside other ways to learn.

The long form, with other packages and real text, is `benchmarks.continual` and `benchmarks.continual_text`.
"""

import pytest
import torch

from benchmarks.quality.learners import full, osft
from benchmarks.quality.model import Small
from benchmarks.quality.runs import Runs, crossing
from benchmarks.quality.symbols import Size, base, measured, scores, sequence

SIZE = Size(width=64, middle=192, layers=2, facts=32, base_steps=400, steps=60, tasks=2, rows=32)
RATES = (2e-4, 4e-4, 8e-4)
PROTECTED = (8e-4, 1.6e-3, 3.2e-3)  # the default learns more slowly at one rate
METHODS = {
    "full": full,
    "weights": osft(protect="weights", ratio=0.5),
    "hard": osft(form="update", strength="hard", ratio=0.5),
    "soft": osft(),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> Small:
    """A model that can copy and knows 32 facts; both as far as can be told without a mistake."""
    small = base(SIZE, 0, tmp_path_factory.mktemp("base"))
    assert min(scores(small, SIZE, 0, 0)) > 0.95
    return small


@pytest.fixture(scope="module")
def curves(known: Small) -> dict[str, list[tuple[float, float]]]:
    """Of each method (learned, forgotten) by learning rate, after two more tasks."""
    old = measured(known, SIZE, 0)
    found = {}
    for name, method in METHODS.items():
        rates = PROTECTED if name == "soft" else RATES
        results = [sequence(known, method, lr, SIZE, 0, old) for lr in rates]
        found[name] = [(one["learned"], -one["bwt"]) for one in results]
    return found


def test_soft_protection_of_inputs_keeps_what_was_known_where_full_fine_tuning_loses_it(curves):
    ours, theirs = (crossing(curves[name], 0.9) for name in ("soft", "full"))
    assert ours is not None and theirs is not None
    assert ours < 0.25 and ours < theirs / 2, curves


def test_measured_inputs_protect_more_than_singular_directions_of_weights(curves):
    soft, hard, weights = (crossing(curves[name], 0.9) for name in ("soft", "hard", "weights"))
    assert soft is not None and hard is not None and weights is not None
    assert max(soft, hard) < 0.75 * weights, curves


def test_one_learning_rate_serves_any_softness(known, curves):
    """Steps are scaled to the length that they would have without protection."""
    old = measured(known, SIZE, 0)
    lr = PROTECTED[-1]
    learned = [sequence(known, osft(damping=damping), lr, SIZE, 0, old)["learned"] for damping in (0.001, 0.1)]
    assert min(*learned, curves["soft"][-1][0], curves["full"][-1][0]) > 0.9, learned


def test_the_cost_at_a_level_is_read_between_two_points_and_never_beyond_them():
    assert crossing([(0.2, 0.0), (0.7, 0.1), (1.0, 0.4)], 0.85) == pytest.approx(0.25)
    assert crossing([(1.0, 0.4)], 0.9) == 0.4
    assert crossing([(0.2, 0.0), (0.7, 0.1)], 0.9) is None


def test_a_benchmark_goes_on_where_it_was_stopped(tmp_path):
    first = Runs("some", "here", tmp_path)
    assert first.take({"lr": 0.1, "seed": 0}, lambda: {"learned": 1.0}) == {"learned": 1.0}
    with first.path.open("a") as file:
        file.write('{"key": {"lr": 0.2')  # stopped in the middle of a line
    second = Runs("some", "here", tmp_path)
    assert second.take({"lr": 0.1, "seed": 0}, lambda: pytest.fail("run again")) == {"learned": 1.0}
    assert second.take({"lr": 0.2, "seed": 0}, lambda: {"learned": 0.5}) == {"learned": 0.5}
    assert len(Runs("some", "here", tmp_path).done) == 2
