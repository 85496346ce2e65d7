"""Make the fixtures of this folder with the code of another commit.

    git worktree add ../before be03921
    cd ../before && PYTHONPATH=src:. python PATH_OF_THIS_FILE FOLDER

All paths inside the fixtures are relative to FOLDER, so that a run resumes wherever the folder is copied.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.toy_run import chats, folder  # of the other commit

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "tie_word_embeddings": True, "max_position_embeddings": 512,
}  # fmt: skip
RUN = """\
model: {{path: model, dtype: float32}}
data: {{train: chat.jsonl, max_length: 64, cache: tokens}}
techniques:
{techniques}
train:
  steps: 6
  tokens_per_step: 128
  optimizer: {{name: adamw, lr: 0.02, weight_decay: 0.1}}
  checkpoint: {{every: 3, keep: 5}}
statistics: {{path: statistics, tokens: {tokens}}}
output: {name}
"""
OSFT = """\
  osft: {soften: 0.05, anchor: true, wire: cached, train: ["*norm*"]}"""
LORA = """\
  lora: {rank: 2, alpha: 6.0, targets: [q_proj, down_proj]}"""
RUNS = {"osft": (OSFT, 512), "lora": (LORA, 0)}
MEASURE = ("--data", "chat.jsonl", "--tokens", "512", "--max-length", "64")
RESUMED_FROM = 3  # steps
PROMPT = torch.arange(3, 19)[None]


def treering(*arguments: str, cwd: Path) -> None:
    subprocess.run([sys.executable, "-m", "treering", *arguments], cwd=cwd, check=True)


def logits(root: Path, exported: str) -> torch.Tensor:
    """Of a dense export as it is; of an adapter merged into the base model by peft."""
    if exported != "adapter":
        model = AutoModelForCausalLM.from_pretrained(root / "exports" / exported)
    else:
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(root / "model")
        model = PeftModel.from_pretrained(base, root / "exports" / exported)
    with torch.no_grad():
        return model.eval()(PROMPT).logits.contiguous()


def run(root: Path, name: str) -> None:
    """Train to the end, export that, and leave the run as if it had been killed after `RESUMED_FROM` steps."""
    techniques, tokens = RUNS[name]
    (root / f"{name}.yaml").write_text(RUN.format(name=name, techniques=techniques, tokens=tokens))
    treering("train", f"{name}.yaml", cwd=root)
    if name == "lora":
        treering("export", name, "--to", "exports/adapter", "--adapter", "default", cwd=root)
    else:
        treering("export", name, "--to", "exports/dense", cwd=root)
    (root / f"{name}.yaml").unlink()  # the run holds it with every default, as config.yaml
    for path in (root / name / "checkpoints").iterdir():
        if path.name != f"step-{RESUMED_FROM}":
            shutil.rmtree(path)
    metrics = root / name / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    saved = next(i for i, line in enumerate(lines) if f"step-{RESUMED_FROM}" in line)
    metrics.write_text("".join(lines[: saved + 1]))
    for made_at_the_end in ("statistics", "logs"):
        shutil.rmtree(root / name / made_at_the_end, ignore_errors=True)


def main(root: Path) -> None:
    from treering.curvature import open as open_statistics

    root.mkdir(parents=True)
    folder(root / "model", **SIZES)
    chats(root / "chat.jsonl", 24)
    treering("measure", "model", "--to", "statistics", *MEASURE, cwd=root)
    for name in RUNS:
        run(root, name)
    shutil.rmtree(root / "tokens")
    expected = {f"logits/{name}": logits(root, name) for name in ("dense", "adapter")}
    statistics = open_statistics(root / "statistics")
    expected |= {f"statistics/{weight}": value["inputs"].contiguous().clone() for weight, value in statistics.items()}
    save_file(expected, root / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
