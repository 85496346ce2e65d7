"""From a configuration to a model that has it in place: one form each, and what trains besides."""

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from treering.technique import Applied, Site
from treering.techniques.osft.coverage import counted, warning
from treering.techniques.osft.coverage import note as coverage_note
from treering.techniques.osft.ranks import free
from treering.techniques.osft.targets import others, targets

if TYPE_CHECKING:
    from treering.techniques.osft.settings import OSFTSettings


def attach(model: nn.Module, config: "OSFTSettings", site: Site) -> Applied:
    every = targets(config, site.anatomy)
    beside = others(config, site.anatomy, every)
    chosen = [target for target in every if free(config, target)]  # without a free direction there is nothing to train
    applied = _form(config)(model, config, site, chosen)
    closed = (f"{len(every) - len(chosen)} targets are closed",) if len(every) > len(chosen) else ()
    more = (f"{len(beside)} other parameters learn without protection",) if beside else ()
    if config.rank != "ratio" and not config.free:
        closed = (*closed, f"rank {config.rank} is counted when weights are read; until then the default ratio stands")
    said = f"{config.form}, protects {config.protect}" + (f" ({config.strength})" * (config.protect != "weights"))
    known: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    if config.protect != "weights" and site.statistics is not None:
        counts = counted(chosen, site.statistics)
        known = (coverage_note(config, counts),)
        warnings = tuple(f"osft: {text}" for text in (warning(counts, chosen, site.statistics),) if text)
    notes = tuple(filter(None, (said, *applied.notes, *known, *closed, *more)))
    without = None if beside else applied.without  # what learns unprotected are plain weights
    return replace(applied, trainable=(*applied.trainable, *beside), without=without, notes=notes, warnings=warnings)


def _form(config: "OSFTSettings"):
    if config.form == "update":
        from treering.techniques.osft.update import attach as update

        return update
    if config.form in ("one_sided", "core"):
        from treering.techniques.osft.addend import attach as addend

        return addend
    from treering.techniques.osft.factors import attach as factors

    return factors
