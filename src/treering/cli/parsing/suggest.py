"""Suggestions for a key that does not exist: a key here, in another section, or for the key of another trainer."""

import difflib
from collections.abc import Sequence

from treering.cli.parsing.problems import Path, dotted
from treering.cli.parsing.sections import paths

# Keys of other trainers' configurations. A path that this version does not have is not suggested.
OTHER_TRAINERS: dict[str, str] = {
    "base_model": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "model_path": "model.path",
    "torch_dtype": "model.dtype",
    "learning_rate": "train.optimizer.lr",
    "optim": "train.optimizer.name",
    "adam_epsilon": "train.optimizer.eps",
    "lr_scheduler": "train.schedule.name",
    "lr_scheduler_type": "train.schedule.name",
    "warmup_ratio": "train.schedule.warmup",
    "warmup_steps": "train.schedule.warmup",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "batch_size": "train.tokens_per_step",
    "micro_batch_size": "train.tokens_per_step",
    "per_device_train_batch_size": "train.tokens_per_step",
    "gradient_accumulation_steps": "train.tokens_per_step",
    "max_grad_norm": "train.clip",
    "gradient_clipping": "train.clip",
    "logging_steps": "train.log_every",
    "eval_steps": "train.evaluate.every",
    "early_stopping_patience": "train.evaluate.patience",
    "save_steps": "train.checkpoint.every",
    "save_total_limit": "train.checkpoint.keep",
    "resume_from_checkpoint": "train.checkpoint.resume",
    "output_dir": "output",
    "lora_r": "techniques.lora.rank",
    "lora_alpha": "techniques.lora.alpha",
    "lora_target_modules": "techniques.lora.targets",
    "target_modules": "techniques.lora.targets",
    "use_rslora": "techniques.lora.rslora",
    "fsdp": "techniques.shard",
    "fsdp_config": "techniques.shard",
    "torch_compile": "techniques.compile",
    "datasets": "data.train",
    "dataset": "data.train",
    "train_file": "data.train",
    "data_path": "data.train",
    "test_datasets": "data.eval",
    "val_set_size": "data.eval_fraction",
    "val_size": "data.eval_fraction",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sequence_len": "data.max_length",
    "seq_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "sample_packing": "data.packing",
    "chat_template": "data.template",
    "preprocessing_num_workers": "data.workers",
}


def closest(word: str, words: Sequence[str], cutoff: float = 0.6) -> str | None:
    """Return the most similar of `words`, or None; case, hyphens and underscores do not count."""
    by_normal = {_normal(w): w for w in words}
    matches = difflib.get_close_matches(_normal(word)[:80], list(by_normal), n=1, cutoff=cutoff)
    return by_normal[matches[0]] if matches else None


def meant_by(root: type, path: Path, allowed: Sequence[str]) -> str:
    """Return the suggestion for the unknown key at `path` of the configuration `root`; empty if there is none.

    `allowed` are the keys of the section that it was written in.
    """
    key, known = str(path[-1]), list(paths(root))
    if "." in key and tuple(key.split(".")) in known:
        return f"write it nested: {': {'.join(key.split('.'))}: …{'}' * key.count('.')} (dots are for --set)"
    if same := next((k for k in allowed if _normal(k) == _normal(key)), None):
        return f"did you mean {same}?"
    others = [p for p in known if isinstance(p[-1], str) and _normal(p[-1]) == _normal(key)]
    if others:
        # A key inside the section that it was written in is the likeliest.
        others.sort(key=lambda p: (p[: len(path) - 1] != path[:-1], len(p)))
        return "it belongs elsewhere: write " + " or ".join(dotted(p) for p in others[:3])
    target = OTHER_TRAINERS.get(key.lower().replace("-", "_"))
    if target and tuple(target.split(".")) in known:
        return f"here it is called {target}"
    if near := closest(key, allowed):
        return f"did you mean {near}?"
    far = closest(key, [str(p[-1]) for p in known], cutoff=0.8)
    return "did you mean " + dotted(next(p for p in known if p[-1] == far)) + "?" if far else ""


def _normal(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "")
