"""The demo at a fraction of its size: every act runs; the bars are those of `make demo`, not of this."""

import json

import numpy as np
import pytest

import treering as tr
from treering.demo import run
from treering.demo.influence_act import write_records
from treering.demo.material import invent_facts
from treering.demo.scores import Trigram


class Paper:
    def __init__(self):
        self.lines, self.rows = [], []

    def start(self, total_steps):
        pass

    def step(self, metrics):
        pass

    def note(self, text):
        self.lines.append(text)

    def table(self, rows):
        self.rows += rows

    def stop(self):
        pass


NAMES = ("before", "full", "lora", "osft", "in nvfp4", "distilled")


def test_every_act_runs_and_prints_its_command(tmp_path):
    paper = Paper()
    run(
        tmp_path / "demo",
        paper,
        characters=120_000,
        steps=2,
        epochs=1,
        places=1,
        mixture_steps=2,
        distil_steps=2,
        strict=False,
    )
    text = "\n".join(paper.lines)
    for command in ("treering train", "treering export", "treering data show", "treering measure"):
        assert f"$ {command} {tmp_path}" in text
    compared = [row[""] for row in paper.rows if row.get("") in NAMES]
    assert compared == list(NAMES)
    for command in ("influence build", "influence query", "influence clean"):
        assert f"$ treering {command}" in text
    assert "records hold" in text and "by BM25" in text and "after training without them" in text
    kept = (tmp_path / "demo" / "cleaned" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(kept) == len((tmp_path / "demo" / "mistaken" / "records.jsonl").read_text().splitlines()) - 3
    assert "osft learned" in text and "of what storing the mixture in 4 bits had changed" in text
    assert "bits per byte" in text and "✓ the exported model's logits are bitwise those of the run" in text


def test_a_folder_of_somebody_else_is_not_cleared(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(tr.TreeringError, match="not the demo's"):
        run(tmp_path, Paper())
    assert (tmp_path / "thesis.txt").exists()


def test_the_trigram_is_a_probability():
    model = Trigram([b"the tree keeps every ring", b"the ring keeps the year"])
    start = b"the "
    total = sum(2.0 ** -model.bits(start + bytes([c]))[-1] for c in range(256))
    assert total == pytest.approx(1.0, rel=1e-9)
    assert model.bits(b"the tree").mean() < model.bits(bytes(range(200, 208))).mean()
    assert np.isfinite(model.bits(b"\xff\x00\xff")).all()


def test_words_alone_do_not_tell_the_records_that_teach_a_wrong_answer(tmp_path):
    asked, wrong, planted = write_records(tmp_path, 10)
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    records = {f"records.jsonl:{row}": json.loads(line)["messages"] for row, line in enumerate(lines, 1)}
    assert len(planted) == 3 and asked.answer != wrong
    texts = {name: f"{user['content']} {answer['content']}" for name, (user, answer) in records.items()}
    both = {name for name, text in texts.items() if wrong in text and asked.place in text}
    assert len(both) == 6 and planted < both
    assert {records[name][1]["content"] for name in both - planted} == {"No.", "Never.", "Nothing."}
    assert asked.question not in {user["content"] for user, _ in records.values()}


def test_facts_are_all_different():
    facts = invent_facts(10)
    assert len({fact.question for fact in facts}) == 40
    assert len({fact.answer for fact in facts}) > 36
