"""Write docs/config.md, and the table of techniques in docs/concepts.md, from the code: `python docs/make.py`.

tests/test_docs.py compares them.

What a setting means is taken from the comment behind its field or the list in its class's docstring. Only what neither
says is said here, in NOTES; a note for a setting that is gone, or for one that explains itself by now, is an error.
"""

import inspect
import io
import re
import tokenize
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

from treering.cli.parsing.resolved import plain_values
from treering.cli.parsing.sections import Key, describe, keys, members, section, shorthand
from treering.cli.schema import RunConfig
from treering.technique import Stage
from treering.techniques import TECHNIQUES

PAGE = Path(__file__).with_name("config.md")
CONCEPTS = Path(__file__).with_name("concepts.md")
MARKS = ("<!-- techniques -->", "<!-- end -->")
HEAD = """\
# Configuration

One YAML (or JSON) file describes one run. This page lists every section and field; it is written by
`python docs/make.py` from the dataclasses that read your file, and a test keeps it up to date. Your editor can have the
same as a JSON schema: `treering config schema > treering.schema.json`.

The shortest file that trains:

```yaml
model: Qwen/Qwen3-0.6B     # text for a section is its one required key: model.path
data: chat.jsonl           # data.train
techniques:
  lora:                    # nothing behind it: with its defaults
output: runs/first
```

* `treering config check FILE` says everything that is wrong with a file, `treering config show FILE` prints it with all
  defaults written out. A run keeps that print as `config.yaml` in its `output` folder.
* `--set train.optimizer.lr=1e-4` overrides one setting from the command line; it can be repeated.
* Relative paths are relative to where the command is run.
* `1e-4` is a number; `yes`, `no`, `on` and `off` are text, so write `true` or `false`; `010` and a key written twice
  are refused. [The command line's page](cli.md#how-yaml-is-read) has the rules.
"""
NOTES = {
    "model": "which model: a folder or a hub name, and how to open it",
    "data": "where examples come from and how they become tokens",
    "techniques": "what is done to the model",
    "train": "how long, how large a step, with what optimizer",
    "objective": "what is minimized: cross-entropy with the labels, unless something is given here",
    "statistics": "what the model is to keep: [measuring](measure.md)",
    "mesh": "how ranks are laid out",
    "output": "the folder for checkpoints, metrics and the resolved configuration",
    "seed": "decides data order, random weights and adapter starts; nothing else is random",
    "model.path": "a Hugging Face folder, or a hub name such as `Qwen/Qwen3-0.6B`",
    "model.dtype": "what the weights are stored in while training; `auto`: what the folder's config says",
    "model.dropout": "for models with dropout: refuse them, set it to 0, or keep it (results then depend on the ranks)",
    "data.train": "a file, a folder or a hub name, or a list of them",
    "data.eval": "the same, for evaluation",
    "data.eval_split": "the same, for `eval`",
    "data.format": "`auto` looks at the first records and says what it found",
    "data.columns": "our field name → the file's: `{messages: conversations}`",
    "data.ignore": "patterns of fields that are left unread",
    "data.max_length": "the longest document, and the capacity of one micro-batch, in tokens",
    "data.packing": "`auto`: on, unless the model's attention cannot be packed exactly; `on`: refuse such a model",
    "data.shuffle": "a new order each epoch, as the seed decides; false: the order of the files, nearly",
    "data.skip_bad": "skip and count samples that cannot be used, instead of ending with the first one",
    "data.skip_untrained": "skip and count samples without a token to train",
    "data.workers": "processes that tokenise",
    "techniques.full.train": "patterns of parameters that learn",
    "techniques.full.freeze": "patterns of parameters that do not, although `train` matches them",
    "techniques.lora.name": "of the adapter: needed when there are several, and to export it",
    "techniques.lora.rank": "inner width r of B A",
    "techniques.lora.file": "a peft adapter folder, for `init: file`",
    "techniques.compile.backend": "`aot_eager` and `eager` are for finding faults",
    "techniques.compile.dynamic": "true: one kernel for all lengths; null: torch decides",
    "train.steps": "optimizer steps; null: as many as `epochs` has",
    "train.epochs": "passes over the data; 0.5 is half of one; not used where `steps` is given",
    "train.clip": "the largest norm of a step's whole gradient; null: no clipping",
    "train.optimizer": "the update rule",
    "train.schedule": "the learning rate over the steps",
    "train.evaluate": "evaluation, early stop, sample generations",
    "train.checkpoint": "saving and resuming",
    "train.log_every": "steps between two lines of the log and of metrics.jsonl",
    "train.optimizer.name": "`muon`: Muon for the matrices inside the blocks, AdamW for everything else",
    "train.optimizer.lr": "the peak learning rate",
    "train.optimizer.weight_decay": "on matrices only; norms and biases are spared",
    "train.schedule.name": "`wsd`: warm-up, stable, decay",
    "train.schedule.warmup": "below 1: a share of all steps; from 1 on: steps",
    "train.schedule.decay": "of `wsd`: as `warmup`",
    "train.schedule.final": "of the peak, at the end",
    "train.evaluate.new_tokens": "of each sample generation",
    "train.checkpoint.resume": "`auto`: go on from the newest whole checkpoint; `never`: refuse a used folder",
    "mesh.replicate": "copies of the sharded model (hybrid sharding)",
    "mesh.shard": "ranks that parameters are sharded over",
    "mesh.sequence": "reserved for sequence-parallel attention: no technique of this version uses it",
    "mesh.expert": "ranks of shard × sequence to which experts are assigned; divides the number of experts. -1: all",
}


def page() -> str:
    used: set[str] = set()
    text = "\n".join([HEAD, *_sections(RunConfig, "", used)]).rstrip() + "\n"
    if left := set(NOTES) - used:
        raise SystemExit(f"docs/make.py: NOTES for settings that are gone or explain themselves: {sorted(left)}")
    return text


def with_techniques(text: str) -> str:
    """Return a page with the table of techniques between its marks."""
    rows = {stage: [f"`{cls.__name__}`" for cls in TECHNIQUES.values() if cls.stage == stage] for stage in Stage}
    lines = [f"| {stage.name} | {', '.join(names) or 'none in this version'} |" for stage, names in rows.items()]
    table = "\n".join([MARKS[0], "| stage | techniques |", "|---|---|", *lines, MARKS[1]])
    return re.sub(f"{MARKS[0]}.*{MARKS[1]}", table, text, flags=re.DOTALL)


def _sections(cls: type, path: str, used: set[str]) -> list[str]:
    prose, listed = _docstring(cls)
    comments = {**_comments(cls), **listed}
    lines = [f"## {path or 'The file'}", "", *([prose, ""] if prose else [])]
    lines += ["| key | allowed | default | meaning |", "|---|---|---|---|"]
    for key in keys(cls).values():
        where = f"{path}.{key.name}" if path else key.name
        lines.append(_row(key, where, comments.get(key.name), used))
    lines.append("")
    for key in keys(cls).values():
        for inner in dict.fromkeys(_dataclasses(key.annotation)):
            lines += _sections(inner, f"{path}.{key.name}" if path else key.name, used)
    return lines


def _row(key: Key, where: str, comment: str | None, used: set[str]) -> str:
    if comment is None:
        if where not in NOTES:
            raise SystemExit(f"docs/make.py: {where} has no comment behind its field and no note; add one of them")
        used.add(where)
        comment = NOTES[where]
    if key.formerly:
        comment += f"; was called `{'`, `'.join(key.formerly)}`"
    inner = section(key.annotation)
    allowed = f"[section](#{_anchor(where)})" if inner else describe(key.annotation)
    if inner and (stands_for := shorthand(key.annotation)):
        allowed += f", or text: its `{stands_for}`"
    default = "required" if key.required else f"`{_written(key.default)}`"
    if inner and not key.required and key.default is not None:
        default = "its defaults"
    return f"| `{key.name}` | {_cell(allowed)} | {default} | {_cell(comment)} |"


def _written(value: Any) -> str:
    plain = plain_values(value)
    if plain is None or isinstance(plain, bool):
        return "null" if plain is None else str(plain).lower()
    if isinstance(plain, list):
        return "[" + ", ".join(map(_written, plain)) + "]"
    return f'"{plain}"' if plain == "*" else str(plain)


def _dataclasses(annotation: Any) -> list[type]:
    found = []
    for member in members(annotation):
        if is_dataclass(member) and isinstance(member, type):
            found.append(member)
        found += [a for a in get_args(member) if is_dataclass(a) and isinstance(a, type)]
    return found


def _docstring(cls: type) -> tuple[str, dict[str, str]]:
    """The prose, and what a list of `name   meaning` lines says of fields."""
    names = set(keys(cls))
    prose: list[str] = []
    listed: dict[str, str] = {}
    last = ""
    text = inspect.cleandoc(cls.__doc__ or "").partition("\nExample:")[0]  # an example is for programs
    for line in text.splitlines():
        found = re.fullmatch(r"(\w+)  +(\S.*)", line)
        if found and found[1] in names:
            last = found[1]
            listed[last] = found[2]
        elif last and line.startswith(" "):
            listed[last] += "; " + line.strip() if re.match(r"\s+\w+: ", line) else " " + line.strip()
        else:
            prose.append(line)
            last = ""
    return "\n".join(prose).strip(), listed


def _comments(cls: type) -> dict[str, str]:
    """Field → the comment behind it, in this class or one that it inherits the field from; or its metadata."""
    found = {f.name: f.metadata["meaning"] for f in fields(cls) if "meaning" in f.metadata}
    if found:  # a class that was made of a list has no source
        return found
    for part in filter(is_dataclass, reversed(cls.__mro__)):
        lines = inspect.getsource(part).splitlines()
        for token in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline):
            if token.type == tokenize.COMMENT and (field := re.match(r"    (\w+): ", lines[token.start[0] - 1])):
                found[field[1]] = token.string.removeprefix("#").strip()
    return {name: text for name, text in found.items() if name in keys(cls)}


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    CONCEPTS.write_text(with_techniques(CONCEPTS.read_text(encoding="utf-8")), encoding="utf-8")
