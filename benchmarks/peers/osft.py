"""mini_trainer 0.9.0 and ours in one process.

python -m benchmarks.peers.osft        makes the environment; `benchmarks.osft` asks it for figures
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.load import resident
from benchmarks.peers import environment
from benchmarks.peers.osft_sides import RATIO, Ours, Theirs, Times, base, batch, clock, one_step, sides

PACKAGES = (
    "rhai-innovation-mini-trainer==0.9.0",
    "numba==0.68.1",
    "llvmlite==0.50.0",
    "aiofiles==25.1.0",
    "deprecated==1.3.1",
    "wrapt==2.5.2",
)
PEER = "mini_trainer"


def ask(*arguments: str) -> Any:
    """A figure from inside the environment, which is made if it is not there."""
    python = environment.python("osft", PACKAGES, proof="mini_trainer.osft_utils")
    return environment.ask(python, "benchmarks.peers.osft", *arguments)


def steps(rounds: int) -> dict[str, list[Times]]:
    """Every side in turn, round after round, after one round that is not counted."""
    every: dict[str, Any] = {PEER: Theirs(base().state_dict(), base().config)}
    for name, technique in sides().items():
        every[name] = Ours(base(), technique, like=base())
    found: dict[str, list[Times]] = {name: [] for name in every}
    data = batch()
    for number in range(rounds + 1):
        for name, side in every.items():
            times = one_step(side, data) | {"inside": side.inside()}
            if number:
                found[name].append(times)
    return found


def decompositions(width: int, rounds: int) -> dict[str, Any]:
    """Seconds for the seven weights of a Llama-8B layer, scaled; and the worst angle to the subspace in float64."""
    from mini_trainer.osft_utils import create_svd_dict

    from treering.techniques.osft.protection.decompose import svd

    long = width * 7 // 2
    sizes = [(width, width)] * 2 + [(width // 4, width)] * 2 + [(long, width)] * 2 + [(width, long)]
    torch.manual_seed(0)
    weights = [torch.randn(size) * 0.02 for size in sizes]
    found: dict[str, Any] = {"ours": [], "theirs": [], "our angle": 0.0, "their angle": 0.0}
    for number in range(rounds):
        seconds = [0.0, 0.0]
        for W in weights:
            kept = int(min(W.shape) * (1 - RATIO))
            began = clock()
            U, _, V = svd(W)
            middle = clock()
            made = create_svd_dict(W, top_k=kept)
            seconds[0] += middle - began
            seconds[1] += clock() - middle
            if not number:
                true_U, _, true_Vh = torch.linalg.svd(W.double(), full_matrices=False)
                true = true_U[:, :kept], true_Vh[:kept].T
                for side, pair in (("our", (U[:, :kept], V[:, :kept])), ("their", (made["U_high"], made["V_high"].T))):
                    worst = max(angle(Q, T) for Q, T in zip(pair, true))
                    found[f"{side} angle"] = max(found[f"{side} angle"], worst)
        found["ours"].append(seconds[0])
        found["theirs"].append(seconds[1])
    return found


def angle(Q: Tensor, true: Tensor) -> float:
    """Sine of the largest principal angle."""
    return float(torch.linalg.matrix_norm(Q.double() - true @ (true.T @ Q.double()), 2))


def memory(side: str) -> dict[str, float]:
    """MiB at the peak of starting, and of three steps, above what the process had before it had a model."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as folder:
        base(64, 1).save_pretrained(small)
        base().save_pretrained(folder)

        def made(place: str) -> Any:
            like = base(64, 1) if place == small else base()
            if side == PEER:
                return Theirs(load_file(f"{place}/model.safetensors"), like.config)
            return Ours(place, sides()[side], like=like)

        one_step(made(small), batch())  # brings in code and threads
        before, found = resident("VmRSS"), {}
        with peak(found, "start"):
            one = made(folder)
        with peak(found, "step"):
            for _ in range(3):
                one_step(one, batch())
    return {name: (value - before) / 2**20 for name, value in found.items()}


@contextmanager
def peak(found: dict[str, float], name: str) -> Iterator[None]:
    """The largest resident set inside. Linux only: it is read, and reset, in /proc."""
    Path("/proc/self/clear_refs").write_text("5")
    yield
    found[name] = resident("VmHWM")


def traffic(ranks: int, layers: int) -> dict[str, float]:
    """Counted as ours is, with its blocks wrapped by hand: as its own wrapping, which wants a GPU, does it."""
    from mini_trainer import osft_utils
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaForCausalLM

    from benchmarks.traffic import Recorder, eightb, pretended

    config = eightb(layers)
    recorder = Recorder()
    with pretended(ranks), ExitStack() as shapes:
        mesh = init_device_mesh("cpu", (ranks,))
        shapes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        shapes.enter_context(recorder)
        model: Any = osft_utils.create_osft_model_class(LlamaForCausalLM)(
            config, osft_config={}, initialize_osft=False, upcast_dtype=torch.float32, output_dtype=torch.float32
        )
        model.osft_config = osft_utils.auto_generate_target_osft_config(model, "llama", rank_ratio=1 - RATIO)
        model.reinitialize_osft(decompose_existing_weights=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("osft_params" in name)
        *blocks, last = model.model.layers
        for block, reshard in (*((block, True) for block in blocks), (last, False), (model, True)):
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        recorder.phase = "model"
        tokens = torch.ones(1, 8, dtype=torch.long)
        model(input_ids=tokens, use_cache=False).logits.float().mean().backward()
        recorder.phase = "gradients"
        model.project_gradients()
        recorder.phase = "step"
        model.project_parameters()
    return {phase: recorder.traffic.sent(phase) for phase in ("model", "gradients", "step")}


def main() -> None:
    torch.set_num_threads(1)
    commands = {
        "steps": lambda rounds: steps(int(rounds)),
        "decompositions": lambda width, rounds: decompositions(int(width), int(rounds)),
        "memory": memory,
        "traffic": lambda ranks, layers: traffic(int(ranks), int(layers)),
    }
    if not sys.argv[1:]:
        environment.python("osft", PACKAGES, proof="mini_trainer.osft_utils")
        return
    command, *arguments = sys.argv[1:]
    print(json.dumps(commands[command](*arguments)), flush=True)


if __name__ == "__main__":
    main()
