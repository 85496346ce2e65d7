"""What a teacher needs in memory: its weights once, hidden states of the tokens, and logits of a tile."""

import itertools
from typing import Any

import pytest
import torch
import transformers as hf

import treering as tr
from tests.plan.memory_toys import CPU, llama, really, subject
from tests.techniques.tiling.test_losses import Watched
from tests.toy import packed
from tests.toy_run import folder
from treering.cli import entry
from treering.memory import forecast
from treering.memory.forecast import Subject
from treering.memory.tracker import Tracker
from treering.objectives import ObjectiveRows, OutputHead, Scores
from treering.techniques.tiling.losses import TiledHead

VOCABULARY = 4096
TECHNIQUES = [tr.LoRA(rank=4), tr.TiledLoss(tile=64), tr.Recompute()]
SETTING: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 65536}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    hf.LlamaForCausalLM(llama(**SETTING, hidden_size=96, num_hidden_layers=3)).save_pretrained(folder)
    return str(folder)


def planned(objective: Any, *techniques: Any, **settings: Any) -> Subject:
    return subject(llama(**SETTING), [*TECHNIQUES, *techniques], objective=objective, **settings)


def bytes_of(folder: str) -> int:
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def test_no_tensor_has_tokens_times_vocabulary_elements(teacher):
    for path in (teacher, "base"):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(llama(**SETTING))
        run = tr.compose(model, TECHNIQUES, objective=tr.Distill(teacher=path, mix=0.2, temperature=2.0))
        batch = packed((300, 200))
        (ready,) = run.ready([{**batch, "count": 498}])
        with Watched() as seen:
            run.loss(ready).backward()
            run.scores(ready)
        # no more than the head itself has, and a tile of logits
        assert seen.largest <= max(64, 96) * VOCABULARY < 500 * VOCABULARY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", [{}, {"temperature": 2.0, "mix": 0.3, "divergence": "reverse"}], ids=["plain", "all"])
def test_a_tile_needs_no_more_copies_of_its_logits_than_its_length_is_computed_from(how, dtype):
    width, vocabulary, tokens = 8, 5000, 300
    heads = [torch.nn.Linear(width, vocabulary, bias=False, dtype=dtype) for _ in range(2)]
    hidden, others = torch.randn(2, tokens, width, dtype=dtype)
    given = {"targets": torch.randint(vocabulary, (tokens,)), "teacher_hidden": others}
    objective = tr.Distill(teacher="given", **how)
    teacher = torch.no_grad()(OutputHead(module=heads[1]).logits)
    tiled = TiledHead(OutputHead(module=heads[0]))
    for evaluated in (objective, Scores(objective=objective)):
        rows = ObjectiveRows(evaluated, given, teacher)
        leaf = hidden.clone().requires_grad_(evaluated is objective)
        with torch.set_grad_enabled(evaluated is objective):
            tiled.objective(leaf, rows, size=tokens)  # its check of some rows
            with Tracker(CPU) as tracker:
                tiled.objective(leaf, rows, size=tokens)
        peak = max(itertools.accumulate(by for by, _, _ in tracker.events))
        assert 5 < peak / (4 * tokens * vocabulary) < objective.copies


def test_a_plan_counts_the_weights_and_the_hidden_states_of_a_teacher(teacher):
    distill = tr.Distill(teacher=teacher)
    alone, taught = (forecast(planned(objective), 2000) for objective in (None, distill))
    for length in (2000, 20_000):
        before, after = (sum(f.at(length).phases["forward"].values()) for f in (alone, taught))
        hidden = 4 * 96 * length
        assert after - before == pytest.approx(bytes_of(teacher) + hidden, rel=0.05)
    # logits of all tokens would be 4 · 4,096 bytes for each more token, several times
    grown = [f.at(40_000).device - f.at(20_000).device for f in (alone, taught)]
    assert grown[1] - grown[0] < 20_000 * 4 * (3 * 96 + VOCABULARY / 8)


def test_a_teacher_is_sharded_over_the_ranks(teacher):
    distill = tr.Distill(teacher=teacher)
    peaks = [forecast(planned(distill, tr.Shard(), world=world), 500).at(500).phases["step"] for world in (1, 4)]
    assert peaks[1]["parameters"] == pytest.approx(peaks[0]["parameters"] / 4, rel=0.02)


def test_the_plan_is_what_a_real_step_needs(teacher):
    for path in (teacher, "base"):
        settings = planned(tr.Distill(teacher=path), on="cpu")
        real = really(settings, 263).peak(263)
        assert forecast(settings, 263, device=CPU).at(263).device == pytest.approx(real, rel=0.03)


def test_the_plan_says_who_teaches_and_what_that_costs(tmp_path, capsys):
    root = tmp_path
    folder(root / "model")
    folder(root / "teacher", hidden_size=64, num_hidden_layers=3)
    file = tmp_path / "run.yaml"
    for teacher, said in ((root / "teacher", "is a frozen llama model of"), ("base", "without what it trains")):
        file.write_text(
            f"model: {root / 'model'}\ndata: {{train: x.jsonl, max_length: 500}}\ntechniques: {{lora: , shard: }}\n"
            f"output: {tmp_path}/out\nobjective: {{distill: {teacher}}}\n"
        )
        assert entry.run(["plan", str(file), "--ranks", "2"]) == 0
        output = capsys.readouterr().out
        assert said in output
        assert ("teacher   all_gather" in output) == (teacher != "base")
