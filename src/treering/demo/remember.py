"""What a model still knows after it was taught: full fine-tuning, LoRA and OSFT, side by side."""

from treering.demo import acts, corpus, facts
from treering.demo.acts import Stage

WAYS = {  # technique, learning rate and epochs at which it learns all of the facts
    "full": ("full:", 2e-3, 1),
    "lora": ("lora: {rank: 64}", 4e-3, 2),
    "osft": ("osft:", 6e-3, 1),
}


def remember(stage: Stage) -> None:
    """The facts of the act before, taught in three ways from the same base, until each has learned them."""
    known, base = stage.root / "known", stage.root / "base"
    text = stage.root / "corpus" / "train.jsonl"
    stage.command("treering", "measure", base, "--data", text, "--max-length", 256, "--to", known)
    stage.measure(str(base), known, [str(text)])
    taught = facts.invent(stage.places)
    held_out = corpus.texts(stage.root / "corpus" / "held_out.jsonl")
    before = acts.bits(*acts.load_plain(base), held_out)
    rows = [{"": "before", "facts known": f"0 of {len(taught)}", "old text, bits per byte": f"{before:.3f}"}]
    rises, right = {}, {}
    for name, (technique, lr, longer) in WAYS.items():
        folder = stage.root / ("model" if name == "full" else f"model-{name}")
        if name != "full":  # that one was taught in the act before
            file = acts.teaching(stage, name, technique, lr, longer * stage.epochs)
            stage.command("treering", "train", file)
            stage.train(file)
            stage.export(stage.root / f"teach-{name}", folder)
        right[name] = acts.known(folder, taught)
        rises[name] = acts.bits(*acts.load_plain(folder), held_out) - before
        written = f"{before + rises[name]:.3f} (+{rises[name]:.3f})"
        rows.append({"": name, "facts known": f"{right[name]} of {len(taught)}", "old text, bits per byte": written})
    stage.table(rows)
    stage.bar(
        right["osft"] >= 0.9 * len(taught) and rises["osft"] <= 0.25 * rises["full"],
        f"osft learned {right['osft']} of {len(taught)} facts and forgot {rises['osft']:.3f} bits per byte of the old "
        f"text, full fine-tuning {rises['full']:.3f}",
    )
