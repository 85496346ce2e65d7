"""A model folder, checked before transformers sees it.

transformers trusts a folder that is already on the disk: it follows what the index names, loads an attention kernel
that the config names from the hub and runs it, and opens a pipe that is called config.json and waits.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering.core.errors import CheckpointError
from treering.store.untrusted.files import MAX_JSON, in_folder, read_json
from treering.store.untrusted.vocabulary import check_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".distcp")
_READ = (".json", ".jinja", ".model", ".txt", ".safetensors", ".tiktoken")
_SMALL, _TEMPLATE, _VOCABULARY = 8 << 20, 1 << 20, 256 << 20
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "adapter_config.json",
    "chat_template.json",
)
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_LAYERS = re.compile(r"(num_|n_)(\w+_)?layers?|depth")
_EXPERTS = re.compile(r"(num|n)_(\w+_)?experts")
_MOST_LAYERS, _MOST_EXPERTS = 4096, 1 << 16
_FILES = 100_000


def check_folder(folder: Path) -> None:
    """Raise CheckpointError if the folder holds what must not be read. Weights are checked when they are opened."""
    for name in _names(folder):
        path = in_folder(folder, name)
        if path is not None and not name.endswith(".safetensors"):
            size, most = path.stat().st_size, _most(name)
            if size > most:
                raise CheckpointError(f"{path} is larger than {most:,} bytes ({size:,}); refused")
    settings = {name: read_json(folder / name, _SMALL) for name in _SETTINGS if in_folder(folder, name)}
    if "config.json" in settings:
        _check_config(folder / "config.json", settings["config.json"])
    _check_tokenizer(folder / "tokenizer_config.json", settings.get("tokenizer_config.json", {}))


def notes_on(folder: Path) -> list[str]:
    """Return notes on files of the folder that are never read."""
    notes = []
    for name in ("config.json", "tokenizer_config.json"):
        if in_folder(folder, name) and "auto_map" in read_json(folder / name, _SMALL):
            notes.append(f"{folder / name} names Python code (auto_map), which is never run: transformers' own is used")
    pickles = sorted(entry.name for entry in _entries(folder) if entry.name.endswith(PICKLES))
    if pickles:
        more = f" and {len(pickles) - 1} more" if len(pickles) > 1 else ""
        notes.append(f"{folder / pickles[0]}{more} may be pickle and is never read")
    return notes


def open_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a local folder, without running code from it and without the network."""
    from transformers import AutoTokenizer

    check_folder(folder)
    if (path := in_folder(folder, "tokenizer.json")) is not None:
        check_tokenizer(read_json(path, _VOCABULARY), path)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # parsers of several libraries, each with bare exceptions of its own
        path = folder / "tokenizer_config.json"
        if path.is_file() and "auto_map" in read_json(path, _SMALL):
            raise CheckpointError(
                f"{path} wants to run Python code from the folder (auto_map), which is never done, and transformers "
                "has no tokenizer of its own for it; take one with a tokenizer.json"
            ) from None
        raise CheckpointError(f"{folder} has no tokenizer that can be read: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, at most 300 characters."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _names(folder: Path) -> Iterator[str]:
    """Yield the names of files that transformers or this package may open."""
    for entry in _entries(folder):
        if entry.name.endswith(_READ):
            yield entry.name
    templates = folder / "additional_chat_templates"
    if templates.is_symlink():
        raise CheckpointError(f"{templates} is a link; refused")
    if templates.is_dir():
        for entry in _entries(templates):
            yield f"{templates.name}/{entry.name}"


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            for number, entry in enumerate(entries):
                if number == _FILES:
                    raise CheckpointError(f"{folder} holds more than {_FILES:,} files; refused")
                yield entry
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from None


def _most(name: str) -> int:
    if name.endswith(".jinja"):
        return _TEMPLATE
    if name in _SETTINGS:
        return _SMALL
    return MAX_JSON if name.endswith(".index.json") else _VOCABULARY


def _check_config(path: Path, config: dict[str, Any]) -> None:
    if "auto_map" in config:
        from transformers import CONFIG_MAPPING

        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise CheckpointError(
                f"{path} wants to run Python code from the folder (auto_map), which is never done, and transformers "
                f"has no model of its own called {kind!r}; take a model that it knows"
            )
    for key, value in _settings(config):
        if _IMPLEMENTATION.fullmatch(key):
            for name in value.values() if isinstance(value, dict) else [value]:
                if name is not None and not (isinstance(name, str) and re.fullmatch(r"[a-z0-9_]+", name)):
                    raise CheckpointError(
                        f"{path}: {key} is {str(name)[:80]!r}, code that transformers would fetch and run; remove it"
                    )
        most = _MOST_LAYERS if _LAYERS.fullmatch(key) else _MOST_EXPERTS if _EXPERTS.fullmatch(key) else None
        if most is not None and isinstance(value, int | float) and value > most:
            raise CheckpointError(f"{path}: {key} is {value:.6g}; more than {most:,} is refused")


def _check_tokenizer(path: Path, config: dict[str, Any]) -> None:
    names = config.get("fast_tokenizer_files", [])
    if not isinstance(names, list) or any(not isinstance(n, str) or os.path.basename(n) != n for n in names):
        raise CheckpointError(f"{path}: fast_tokenizer_files is not a list of plain names in the folder; refused")
    if config.get("init_inputs"):
        raise CheckpointError(f"{path}: init_inputs names what the tokenizer would open; refused: remove it")


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key of a config and of the configs inside it, with its value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _settings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _settings(inner)
