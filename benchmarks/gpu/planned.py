"""What `treering plan` predicts for the configurations of the memory row; a process of its own prints it as JSON.

    python -m benchmarks.gpu.planned [--toy]

Memory is planned on a stand-in for an accelerator, which a process cannot get once it has computed gradients.
"""

import argparse
import json
from typing import Any

from benchmarks.gpu.sizes import CARD, TOY, Sizes


def configurations() -> dict[str, tuple[list[Any], str, int]]:
    """Techniques, the dtype of the model and how many times `memory_tokens` the sequence has, by name.

    The lengths are such that the peak lies in the loss of some, and in the blocks of others.
    """
    import treering as tr

    tiles = [tr.TiledBlock(), tr.TiledLoss()]
    return {
        "full": ([tr.Full()], "bfloat16", 1),
        "lora": ([tr.LoRA()], "bfloat16", 1),
        "osft, the default, in bfloat16": ([tr.OSFT(), tr.Shard(compute="bfloat16")], "float32", 1),
        "full, tiled MLP and loss": ([tr.Full(), tr.TiledMLP(), tr.TiledLoss()], "bfloat16", 2),
        "full, tiled block and loss, recompute": ([tr.Full(), *tiles, tr.Recompute()], "bfloat16", 8),
        "full, the same with offload": ([tr.Full(), *tiles, tr.Recompute(offload="cpu")], "bfloat16", 8),
    }


def predicted(sizes: Sizes) -> dict[str, float]:
    """Peak bytes of tensors, by configuration: the forecast without what it adds for the driver."""
    import torch

    from benchmarks.gpu.models import adamw
    from treering.core.topology import mesh
    from treering.memory import Subject, forecast, pretend

    found = {}
    for name, (techniques, dtype, times) in configurations().items():
        tokens = times * sizes.memory_tokens
        subject = Subject(
            config=sizes.config(sizes.few),
            dtype=getattr(torch, dtype),
            techniques=techniques,
            optimizers=lambda run: [adamw(run)],
            mesh=lambda: mesh(device=pretend.NAME),
        )
        peak = forecast(subject, tokens).at(tokens)
        found[name] = peak.device - peak.reserved
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    print(json.dumps(predicted(TOY if options.toy else CARD)), flush=True)


if __name__ == "__main__":
    main()
