"""Long work reports how much of it is done, and short work does not."""

import treering as tr
from tests.zoo import build
from treering.core import progress
from treering.plan.compose import draft, load


def test_reports_are_rare_and_estimate_what_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    texts = []
    one = progress.PartsDone("splitting", [1.0] * 100, texts.append)
    for _ in range(100):
        now[0] += 1.0
        one.done(1.0)
    assert texts[:3] == [
        "splitting: 5 of 100, about 95 s left",
        "splitting: 10 of 100, about 90 s left",
        "splitting: 20 of 100, about 80 s left",
    ]
    assert len(texts) == 5 and texts[-1] == "splitting: 80 of 100, about 20 s left"


def test_the_cost_of_parts_counts_not_their_number(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    texts = []
    one = progress.PartsDone("splitting", [600.0, 1.0, 1.0, 1.0], texts.append)
    now[0] = 600.0
    one.done(600.0)
    assert texts == ["splitting: 1 of 4, about 3 s left"]


def test_short_work_reports_nothing_and_preparing_weights_does(monkeypatch):
    osft = tr.OSFT(protect="weights", ratio=0.5)
    texts = []
    load(draft(build("llama"), [osft]), report=texts.append)
    assert not texts
    monkeypatch.setattr(progress, "_FIRST", 0.0)
    load(draft(build("llama"), [osft]), report=texts.append)
    assert texts and all(text.startswith("preparing weights: ") and text.endswith(" left") for text in texts)
