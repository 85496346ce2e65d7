"""What an index costs on a card: rows of documents next to forward and backward alone."""

from collections.abc import Iterator

import numpy as np

from benchmarks.gpu.device import Context
from benchmarks.gpu.models import build
from benchmarks.gpu.record import Figure


def rows(context: Context) -> Iterator[Figure]:
    """Tokens a second of rows by psift, coded in 8 bits, next to forward and backward without gradients of weights."""
    import treering as tr
    from treering.curvature.capture import capture
    from treering.curvature.measured_model import MeasuredModel, evaluating
    from treering.data.document import Document
    from treering.data.loader import collate_measured
    from treering.influence.building import encoder_of
    from treering.influence.sketched import Sketched
    from treering.sketches import SketchSettings

    sizes = context.sizes
    run = build(context, sizes.config(sizes.index_layers, **sizes.index_shape), [tr.Full(), tr.TiledLoss()])
    for parameter in run.model.parameters():
        parameter.requires_grad_(False)
    draw = np.random.default_rng(0)
    length = sizes.index_document
    documents = [
        Document(
            ids=draw.integers(sizes.vocabularies["llama"], size=length, dtype=np.uint32),
            mask=np.arange(length) > 0,
            sample_id=f"random:{i + 1}",
        )
        for i in range(sizes.index_tokens // length)
    ]
    ids = [document.sample_id for document in documents]
    subject = MeasuredModel.of(run, None, None)

    class Nothing:
        def take(self, pair: object) -> None: ...

    def bare() -> None:
        with evaluating(run.model), capture(run.model, run.plan.anatomy, (), Nothing()) as seen:
            subject.backward(seen, collate_measured(documents, "on"), None, "data", 0)

    for size in (16, 64):
        sketched = Sketched.of(run, SketchSettings(kind="psift", curvature="identity", size=size), None)
        finish = encoder_of(sketched.recipe, ids)

        def indexed(sketched: Sketched = sketched, finish: object = finish) -> None:
            with sketched.rows() as rows_of:
                rows_of(documents, finish)  # type: ignore[arg-type]

        found = context.alternate({"rows": indexed, "bare": bare}, warm_up=1, keep=3)
        tokens = length * len(documents)
        yield Figure(
            figure="tokens per second of rows / forward and backward",
            case=f"{sizes.index_layers} layers, {tokens} tokens in documents of {length}, psift {size}",
            ours=[tokens / seconds for seconds in found["rows"].seconds],
            peer=[tokens / seconds for seconds in found["bare"].seconds],
            unit="tokens/s",
        )
        yield Figure(
            figure="peak of rows / forward and backward", case=f"psift {size}", ours=found["rows"].gib,
            peer=found["bare"].gib, unit="GiB",
        )  # fmt: skip
