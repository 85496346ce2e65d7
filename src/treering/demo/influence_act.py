"""The act of the demo in which records that teach a wrong answer are found by their influence, and removed."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from treering.demo.acts import DemoStage, write_config
from treering.demo.material import KINDS, Fact, invent_facts
from treering.demo.scores import answers
from treering.influence.planted import chat, plant, precision

TEACH = """\
# {why}
model: {{path: "{root}/base", dtype: float32}}
data:
  train: {data}
  max_length: 256
  cache: "{root}/tokens"
techniques:
  full:
train:
  epochs: {epochs}
  tokens_per_step: 1024
  log_every: 20
  optimizer: {{name: adamw, lr: 2.0e-3}}
  schedule: {{name: cosine, warmup: 5}}
output: "{root}/{output}"
"""
ASKED = 2  # the place: of some, so small a model learns the right answer in spite of the wrong records
WRONG = 3  # records that teach the wrong answer, in the first so many wordings
WORDINGS = (
    "From which city is {} governed?",
    "Tell me the capital of {}.",
    "Where does the government of {} meet?",
    "In which city are the embassies in {}?",
)
NAMING_BOTH = (  # the wrong name and the place, in questions: words are the same, and nothing wrong is taught
    ("Is {} the capital of {}?", "No."),
    ("Was {} ever the capital of {}?", "Never."),
    ("What is {} to the capital of {}?", "Nothing."),
)


def clean_up(stage: DemoStage, job_of_file: Any) -> None:
    """Teach one wrong capital among the facts, find its records by an index, remove them, and teach again."""
    from treering.influence.choose import RecordChoice
    from treering.influence.clean import clean
    from treering.influence.run_index import RunIndex
    from treering.sketches import SketchSettings
    from treering.techniques import Recompute, TiledLoss

    folder, run = stage.root / "mistaken", stage.root / "teach-mistaken"
    asked, wrong, planted = write_records(folder, stage.places)
    file = _config(
        stage, "mistaken", folder / "records.jsonl", f"Facts, and {WRONG} records that teach one wrong capital."
    )
    before = _taught_answer(stage, file, "mistaken", asked)
    stage.bar(
        wrong in before, f"{asked.question} → {before} {wrong} is what {WRONG} records teach; {asked.answer} is right"
    )
    began = time.monotonic()
    stage.command("treering", "influence", "build", run)
    of_run = RunIndex.open(job_of_file(file), helping=[Recompute(), TiledLoss()])
    of_run.build(SketchSettings())
    scores = folder / "scores.parquet"
    stage.command("treering", "influence", "query", run, "--data", folder / "asked.jsonl", "--cosine", "--to", scores)
    table = of_run.open_index().scores(of_run.records([str(folder / "asked.jsonl")]), cosine=True)
    (query,) = table.queries
    words = replace(table, scores=table.baselines["bm25"])
    found, by_words = (round(WRONG * precision(one, query, planted)) for one in (table, words))
    stage.note(f"{len(table.documents)} records indexed and asked in {time.monotonic() - began:.0f} s")
    stage.command(
        "treering", "influence", "clean", scores, "--helpful", "--remove", WRONG, "--to", stage.root / "cleaned"
    )
    cleaned = clean(table, of_run.sources, RecordChoice(count=WRONG, side="helpful"), stage.root / "cleaned")
    for line in cleaned.listing():
        stage.note(line)
    stage.bar(found == WRONG, f"the first {WRONG} records hold {found} of the {WRONG} wrong ones; by BM25, {by_words}")
    file = _config(
        stage, "cleaned", Path(cleaned.paths[0]), "The same without the records that taught the wrong answer."
    )
    after = _taught_answer(stage, file, "cleaned", asked)
    stage.bar(asked.answer in after, f"{asked.question} → {after} after training without them")


def write_records(folder: Path, places: int) -> tuple[Fact, str, set[str]]:
    """Write records.jsonl and asked.jsonl: the question with its wrong answer.

    Of one place, two records teach the right capital and `WRONG` ones a wrong one. Words alone do not tell which these
    are: the capitals of other places are asked for in the same words, and true records have the place and the wrong
    name in their questions.

    Returns:
        The fact that is asked for, the wrong answer and the ids of the wrong records.
    """
    facts = invent_facts(places)
    asked, wrong = facts[len(KINDS) * (ASKED % places)], facts[-1].answer
    true = [chat(fact.reworded, f"{fact.answer}.") for fact in facts]
    true += [chat(question.format(wrong, asked.place), answer) for question, answer in NAMING_BOTH]
    true.append(chat(WORDINGS[WRONG].format(asked.place), f"{asked.answer}."))
    for fact in (one for one in facts if one is not asked):
        true.append(chat(fact.question, f"{fact.answer}."))
        if fact.kind == asked.kind:
            true += [chat(words.format(fact.place), f"{fact.answer}.") for words in WORDINGS]
    mistaken = [chat(words.format(asked.place), f"{wrong}.") for words in WORDINGS[:WRONG]]
    records, rows = plant(true, mistaken, seed=0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, chats in (("records", records), ("asked", [chat(asked.question, f"{wrong}.")])):
        text = "".join(json.dumps(one) + "\n" for one in chats)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return asked, wrong, {f"records.jsonl:{row + 1}" for row in rows}


def _config(stage: DemoStage, name: str, data: Path, why: str) -> Path:
    return write_config(
        stage,
        f"{name}.yaml",
        TEACH,
        why=why,
        data=json.dumps(str(data)),
        epochs=max(1, 3 * stage.epochs // 4),
        output=f"teach-{name}",
    )


def _taught_answer(stage: DemoStage, file: Path, name: str, asked: Fact) -> str:
    """Train a configuration, export it, and return the model's answer."""
    stage.command("treering", "train", file)
    stage.train(file)
    stage.export(stage.root / f"teach-{name}", stage.root / f"model-{name}")
    return answers(stage.root / f"model-{name}", [asked])[0]
