"""MLPs and whole blocks in tiles inside recompute, next to recompute alone: forward and backward of a few layers."""

from collections.abc import Iterator

from benchmarks.gpu.device import Context
from benchmarks.gpu.models import batch, build, forward_backward
from benchmarks.gpu.record import Figure

BARS = {"tiledmlp": 1.12, "tiledblock": 1.12}  # of the time of recompute alone, as on the CPU


def rows(context: Context) -> Iterator[Figure]:
    import treering as tr

    sizes = context.sizes
    common = [tr.Full(train=("*_proj.weight", "*norm*")), tr.Recompute(), tr.TiledLoss()]
    data = batch(context, sizes.tile_tokens, sizes.tile_document)
    config = sizes.config(sizes.few)
    runs = {
        "recompute": build(context, config, common),
        "tiledmlp": build(context, config, [*common, tr.TiledMLP()]),
        "tiledblock": build(context, config, [*common, tr.TiledBlock()]),
    }
    sides = {name: (lambda run=run: forward_backward(run, data)) for name, run in runs.items()}
    found = context.alternate(sides, warm_up=1, keep=2)
    case = f"{sizes.few} layers, {sizes.tile_tokens} tokens in documents of {sizes.tile_document}, bfloat16, tiled loss"
    alone = found["recompute"]
    for name, bar in BARS.items():
        yield Figure(
            figure=f"{name} inside recompute / recompute alone, time", case=case, ours=found[name].seconds,
            peer=alone.seconds, unit="s", at_most=bar,
        )  # fmt: skip
        yield Figure(
            figure=f"{name} inside recompute / recompute alone, peak above the start", case=case, ours=found[name].gib,
            peer=alone.gib, unit="GiB", at_most=1.0,
        )  # fmt: skip
