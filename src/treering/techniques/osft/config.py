"""The technique `osft`: fine-tuning that protects the directions in which the model already uses its weights."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from treering.core.errors import PlanError
from treering.core.progress import in_words
from treering.core.settings import refuse_former_names
from treering.core.topology import axis_size
from treering.technique import Applied, Claim, Need, Site, Stage
from treering.techniques.osft.settings import ADDENDS, FACTORED, OSFTSettings

SECONDS_FOR_EACH = 5e-10  # of one core, for each unit of `Part.cost`: eigenvectors of 1,024 × 1,024 take 0.5 s

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from treering.anatomy import Anatomy
    from treering.anatomy.matrices import Matrix


@refuse_former_names
@dataclass(frozen=True, kw_only=True)
class OSFT(OSFTSettings):
    """Fine-tune weights in unprotected directions: W changes by P_out ΔW P_in, where P removes protected directions.

    protect   inputs: the directions in which measured text reads the weight (needs `treering measure`)
              weights: the largest singular directions of the weight; both: inputs on
              one side, weights on the other
    strength  of `inputs`. soft: the more a direction was used, the more it is protected; hard: the most used directions
              are protected completely, the others not at all
    damping   λ of soft protection, 1 / (energy / mean energy + λ): a smaller value protects more
    ratio     the share of the directions that is trainable. 0: nothing changes, 1: everything may. null: ¼ of the
              weights' directions, ½ of the inputs' where a form or `hard` needs a number; soft protection treats every
              direction by its own use and needs none
    ratios    pattern -> ratio, for weights that are to have another
    rank      what decides the number of trainable directions. ratio: `ratio`; energy: as many are protected as contain
              `energy` of the spectrum; importance: more are protected of weights that do
              not turn their inputs
    energy    of `rank: energy`: the share of the spectrum that is protected
    importance  of `rank: importance`: a and b of a + I (b − a), the share that is protected, with I of mean 1
    form      merged: an adapter ΔW = Z Bᵀ inside the trainable directions of the inputs that is added to W after each
              step; the forward is that of the plain model, and an optimizer has a state of the size of Z
              update: W itself trains, its gradient and its step are projected; exact for every optimizer
              one_sided: an adapter ΔW = B Z inside the trainable directions; few parameters, W may be quantized
              core: an adapter ΔW = B Z C between trainable directions on both sides; fewest parameters, and not all
              directions that one_sided can train
              forward: W in factors, projected inside the forward; no hook, no message of its own
              factors: W in factors, gradients projected before the step and parameters after it
    communication  of `factors`: coefficients are summed, the basis is gathered, or gathered once and kept. cached, of
              `update`: one rank keeps a weight's complete operators, and rows are sent to it; else operators
              are gathered
    precision  of soft protection: what the bases of `merged` and the operators of `update` are stored, sent and
              multiplied in, where weights are float32; hard protection has the dtype of the weights
    compute   of the factored forms, how y = W x is computed: auto chooses by token count; all ways give equal results
    keep_initial  keep the initial weights, so that weight decay acts on the change and the leak is exact (`update`)
    targets   `all-linear`: every linear and stacked expert inside the blocks but routers; or patterns
    train     other plain parameters to train without protection, by pattern; the rest of the model is frozen
    free      weight -> number of trainable directions: what `rank` decided, written by `resolve`
    unmeasured  what happens to an expert, or a linear, that no token of the measured text reached. refuse: an error
              freeze: it is not trained
              unprotected: it is trained without protection

    Example:
        run = tr.compose("MODEL", [tr.OSFT()], statistics=known, prepared="prepared")
    """

    stage: ClassVar[Stage] = Stage.ADAPT

    def __repr__(self) -> str:
        """Return the settings as text. A checkpoint stores it and a resumed run must have the same text, so
        `unmeasured` is left out where it has no effect: runs from before that setting existed can be resumed."""
        names = [f.name for f in fields(self) if f.name != "unmeasured" or self.unmeasured == "freeze"]
        values = {name: getattr(self, name) for name in names} | {"form": self.chosen_form}
        return f"OSFT({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    def resolve(self, anatomy: "Anatomy", source: Any, statistics: Any) -> "OSFT":
        """Return these settings with the numbers that depend on the spectrum; missing statistics are a PlanError."""
        if self.measured and statistics is None and source is not None:
            raise PlanError(
                "osft protects the directions that measured text uses, and there are no statistics. Measure text that "
                "represents what must be kept (treering measure MODEL --data FILE --to DIR) and name the folder as "
                "statistics.path (statistics= in compose), or set osft.protect to weights",
                settings=("techniques.osft.protect", "statistics.path"),
            )
        if self.measured and statistics is not None:
            from treering.techniques.osft.protection.coverage import refuse_unmeasured
            from treering.techniques.osft.protection.targets import targets

            refuse_unmeasured(self, targets(self, anatomy), statistics)
        if self.rank == "ratio" or self.free or source is None:
            return self
        from treering.techniques.osft.protection.targets import resolved

        return resolved(self, anatomy, source, statistics)

    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> list[Claim]:
        from treering.techniques.osft.protection.targets import targets, unprotected

        chosen = targets(self, anatomy)
        self._check(anatomy, chosen)
        ranks = axis_size(mesh, "expert")
        stacks = [target.weight for target in chosen if target.experts is not None]
        if ranks > 1 and stacks and self.chosen_form in FACTORED:
            raise PlanError(
                f"osft: the mesh has expert={ranks}, and form {self.form} makes weights of experts from factors that "
                f"are not assigned to ranks ({stacks[0]}); use form update, leave expert out of the mesh, or name "
                "other osft.targets",
                settings=("osft.form", "osft.targets", "mesh.expert"),
            )
        claims = []
        for target in chosen:
            weight = target.weight
            needs: tuple[Need, ...] = ("plain_weight", "own_value")
            claims.append(Claim(fqn=weight, aspect="gradient", needs=needs, setting="osft.targets"))
            if self.chosen_form in FACTORED:
                claims.append(Claim(fqn=weight, aspect="storage", setting="osft.targets"))
            if self.chosen_form in ADDENDS:
                held: tuple[Need, ...] = needs if self.chosen_form == "merged" else ()
                claims[-1] = Claim(fqn=weight, aspect="gradient", exclusive=True, needs=held, setting="osft.targets")
                claims.append(Claim(fqn=weight, aspect="addend", setting="osft.targets"))
            if self.chosen_form in ADDENDS and target.lead:  # registered with the experts' one forward
                own = f"{target.module}.osft_{target.leaf}"
                claims.append(Claim(fqn=own, aspect="forward", setting="osft.targets"))
            elif self.chosen_form != "update":
                claims.append(Claim(fqn=target.module, aspect="forward", exclusive=False, setting="osft.targets"))
        for name in unprotected(self, anatomy, chosen):
            claims.append(Claim(fqn=name, aspect="gradient", needs=("plain_weight",), setting="osft.train"))
        return claims

    def _check(self, anatomy: "Anatomy", chosen: "Sequence[Matrix]") -> None:
        """Raise a PlanError for settings that this model cannot have, before the model is changed."""
        from treering.anatomy import matches
        from treering.techniques.osft.protection.targets import directions, trainable

        for pattern in self.ratios:
            if not any(matches(t.weight, pattern) or matches(t.module, pattern) for t in chosen):
                raise PlanError(
                    f"osft: the pattern {pattern!r} of osft.ratios matches no target; {chosen[0].module} is one",
                    settings=("techniques.osft.ratios",),
                )
        for target in chosen:
            if not 0 <= trainable(self, target) <= directions(self, target):
                raise PlanError(
                    f"osft: {target.weight} has {directions(self, target)} directions, and osft.free is "
                    f"{trainable(self, target)}",
                    settings=("techniques.osft.free",),
                )
        if not any(trainable(self, target) for target in chosen) and not self.train:
            raise PlanError(
                "osft: no target has a trainable direction, so nothing would be trained; raise osft.ratio",
                settings=("techniques.osft.ratio",),
            )

    def apply(self, model: "nn.Module", site: Site) -> Applied:
        """Install the form in the model. Trained are the parameters of the form and those of `train`."""
        from treering.techniques.osft.protection.targets import targets, trainable, unprotected

        every = targets(self, site.anatomy)
        others = unprotected(self, site.anatomy, every)
        chosen = [matrix for matrix in every if trainable(self, matrix)]  # the others have nothing to train
        applied = self._install(model, site, chosen)
        notes, warnings = self._coverage(chosen, site)
        if len(every) > len(chosen):
            notes.append(f"{len(every) - len(chosen)} targets are frozen: they have no trainable direction")
        notes += self._effort(applied, chosen)
        if self.rank != "ratio" and not self.free:
            notes.append(f"rank {self.rank} is counted when weights are read; until then the default ratio is used")
        if others:
            notes.append(f"{len(others)} other parameters are trained without protection")
        form = f"{self.chosen_form}, protects {self.protect}" + (f" ({self.strength})" * (self.protect != "weights"))
        return replace(
            applied,
            trainable=(*applied.trainable, *others),
            without=None if others else applied.without,  # parameters trained without protection are plain weights
            notes=(form, *applied.notes, *notes),
            warnings=tuple(warnings),
        )

    def _effort(self, applied: Applied, chosen: "Sequence[Matrix]") -> list[str]:
        """Return a note on the time that preparing takes, where it is minutes."""
        seconds = SECONDS_FOR_EACH * sum(part.cost for part in applied.parts.values())
        widest = max((matrix.inputs if self.measured else matrix.rank for matrix in chosen), default=0)
        if seconds < 60:
            return []
        return [
            f"directions of {len(applied.parts):,} weights are prepared once, in float64, the largest of "
            f"{widest:,} × {widest:,}: about {in_words(seconds)} of one CPU core, shared among ranks; where there are "
            "cards, they are used"
        ]

    def _install(self, model: "nn.Module", site: Site, chosen: "Sequence[Matrix]") -> Applied:
        if self.chosen_form == "merged":
            from treering.techniques.osft import merged_adapter

            return merged_adapter.install(model, self, site, chosen)
        if self.chosen_form == "update":
            from treering.techniques.osft.update import update_form

            return update_form.install(model, self, site, chosen)
        if self.chosen_form in ADDENDS:
            from treering.techniques.osft import protected_adapter

            return protected_adapter.install(model, self, site, chosen)
        from treering.techniques.osft.forward_factors import factored

        return factored.install(model, self, site, chosen)

    def _coverage(self, chosen: "Sequence[Matrix]", site: Site) -> tuple[list[str], list[str]]:
        """Return notes and warnings about what was not measured, or on too little text."""
        if self.protect == "weights" or site.statistics is None:
            return [], []
        from treering.techniques.osft.protection.coverage import counted, coverage_note, coverage_warning

        counts = counted(chosen, site.statistics)
        note, warning = coverage_note(self, counts), coverage_warning(counts, chosen, site.statistics)
        return [note] if note else [], [f"osft: {warning}"] if warning else []
