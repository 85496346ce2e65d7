"""The technique `ulysses`: ranks of the mesh's axis `sequence` compute one row of tokens together, exactly."""

from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from treering.core.errors import PlanError
from treering.core.topology import axis_size
from treering.technique import Applied, Claim, Message, Site, Stage, Workload
from treering.techniques.ulysses.settings import UlyssesSettings

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from treering.anatomy import Anatomy
    from treering.techniques.ulysses.ranks import SequenceRanks
    from treering.techniques.ulysses.shares import Grid
    from treering.techniques.ulysses.traffic import SentForm


@dataclass(frozen=True, kw_only=True)
class Ulysses(UlyssesSettings):
    """Spread each row of tokens over the ranks of the mesh's `sequence` axis; attention exchanges heads or keys.

    transport  how ranks exchange: by one `collective`, or `paired`, in rounds of one partner, for hosts whose cards
               cannot reach one another directly; the results have the same bits
    layout     `heads`: each rank computes attention of all tokens for some heads. `gathered`: of its own tokens, with
               all keys. `2d`: both. `auto`: what takes least time for this model and number of ranks
    codec      in which form tensors are sent: `none`, in the dtype of the model; `int8`, rotated, with the mean apart;
               `e4m3`. The codes take half of the bytes of bfloat16, and round
    uncoded    what a codec leaves as it is: query, key, value, output, gradients

    Example:
        run = tr.compose("MODEL", [tr.Full(), tr.Ulysses(), tr.Shard()], mesh=tr.mesh(sequence=2))
    """

    stage: ClassVar[Stage] = Stage.FORWARD

    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> list[Claim]:
        return [Claim(fqn="", aspect="attention", setting="ulysses")]

    def apply(self, model: "nn.Module", site: Site) -> Applied:
        from treering import attention
        from treering.core.module_forward import install, undo_all
        from treering.techniques.ulysses.coded import Codecs, CodingErrors
        from treering.techniques.ulysses.ranks import SequenceRanks
        from treering.techniques.ulysses.rotary import depends_on_batch, install_rotary
        from treering.techniques.ulysses.split_batch import OnlyShares, split_batch

        if site.mesh is None or axis_size(site.mesh, "sequence") == 1:
            return Applied(notes=("the mesh has sequence=1: rows of tokens are not spread over ranks",))
        reason = attention.packable(model, site.anatomy)
        if reason:
            raise PlanError(
                f"ulysses: {reason}, so its rows of tokens cannot be spread over ranks. Leave ulysses out and set "
                "mesh.sequence to 1; shard.offload, recompute and tiles make longer rows fit on one rank",
                settings=("ulysses", "mesh.sequence"),
            )
        grid = self.grid(site.anatomy, axis_size(site.mesh, "sequence"))
        errors = CodingErrors(2 * (len(site.anatomy.attentions) // 4) + 1, site.mesh.device_type)
        codecs = Codecs.of(self.codec, self.uncoded, errors)
        for one in site.anatomy.attentions:
            codecs.check(one.head_dim, one.value_dim)
        ranks = SequenceRanks.of_mesh(site.mesh, grid, self.transport, codecs)
        body: Any = getattr(model, "base_model", model)  # a tiled loss calls it without the model around it
        undone = [install(OnlyShares(body))] + ([install_rotary(model)] if depends_on_batch(model.config) else [])
        return Applied(
            batch=partial(split_batch, ranks=ranks),
            tokens=ranks.tokens,
            messages=partial(self._messages, model, site.anatomy, ranks),
            busiest=partial(self._busiest, site.anatomy, ranks.grid),
            compared=partial(self._compared, model, site.anatomy, ranks.grid),
            metrics=None if self.codec == "none" else partial(errors.metrics, site.mesh["sequence"].get_group()),
            undo=undo_all(undone),
            notes=(_note(grid, site.anatomy),),
        )

    def for_teacher(self, student: "Anatomy", mesh: "DeviceMesh | None") -> "Ulysses":
        """Return the technique for a teacher, which is given the student's shares of rows, whatever its own heads."""
        return TaughtRows(**{one.name: getattr(self, one.name) for one in fields(Ulysses)}, student=student)

    def grid(self, anatomy: "Anatomy", ranks: int) -> "Grid":
        """Return how the ranks of the axis `sequence` are arranged."""
        from treering.techniques.ulysses.sent import layers
        from treering.techniques.ulysses.shares import Grid
        from treering.techniques.ulysses.traffic import choose, grids

        if self.layout == "heads":
            return Grid(heads=ranks)
        if self.layout == "gathered":
            return Grid(heads=1, gathered=ranks)
        among = grids(ranks)
        if self.layout == "2d":
            among = [grid for grid in among if grid.heads > 1 and grid.gathered > 1]
            if not among:
                raise PlanError(
                    f"ulysses: layout is 2d, and {ranks} ranks of the axis `sequence` are no rows and columns; write "
                    "heads, gathered or auto, or a number of ranks that is not prime",
                    settings=("ulysses.layout", "mesh.sequence"),
                )
        return choose(layers(anatomy), among, form=self._form())

    def _messages(
        self, model: "nn.Module", anatomy: "Anatomy", ranks: "SequenceRanks", work: Workload
    ) -> list[Message]:
        from treering.techniques.ulysses.sent import itemsize, messages_of

        grid = self._grid_for(anatomy, ranks.grid, work)
        rank = ranks.rank if grid is ranks.grid else 0
        return messages_of(model, anatomy, grid, rank, work, self._form(itemsize(model, anatomy)))

    def _busiest(self, anatomy: "Anatomy", grid: "Grid", work: Workload) -> float:
        from treering.techniques.ulysses.sent import layers
        from treering.techniques.ulysses.traffic import busiest

        grid = self._grid_for(anatomy, grid, work)
        return max(busiest(widths, grid) for widths in layers(anatomy))

    def _compared(self, model: "nn.Module", anatomy: "Anatomy", grid: "Grid", work: Workload) -> list[str]:
        from treering.core.links import Links
        from treering.techniques.ulysses.sent import itemsize, layers
        from treering.techniques.ulysses.traffic import compared

        return compared(layers(anatomy), grid, work.tokens, Links(), self._form(itemsize(model, anatomy)))

    def _form(self, itemsize: int = 2) -> "SentForm":
        """Return the form in which tensors are sent; a run chooses a layout before it knows the bytes of an element."""
        from treering.techniques.ulysses.traffic import SentForm

        padded = self.transport == "collective"
        return SentForm(itemsize=itemsize, codec=self.codec, uncoded=tuple(self.uncoded), padded=padded)

    def _grid_for(self, anatomy: "Anatomy", grid: "Grid", work: Workload) -> "Grid":
        """Return `grid`, that of the mesh, or that of as many ranks as `work` asks for."""
        from treering.techniques.ulysses.shares import Grid

        ranks = work.sequence or grid.ranks
        if ranks == grid.ranks:
            return grid
        return Grid(heads=1) if ranks == 1 else self.grid(anatomy, ranks)


@dataclass(frozen=True, kw_only=True)
class TaughtRows(Ulysses):
    """`Ulysses` of a teacher, whose ranks are arranged as the student's."""

    student: "Anatomy"

    def grid(self, anatomy: "Anatomy", ranks: int) -> "Grid":
        """Return how the ranks of the axis `sequence` are arranged."""
        return super().grid(self.student, ranks)


def _note(grid: "Grid", anatomy: "Anatomy") -> str:
    heads = f"{len(anatomy.attentions)} attentions exchange tokens for heads among {grid.heads} ranks"
    keys = f"{grid.gathered} ranks gather each other's keys and values"
    if grid.gathered == 1:
        return heads
    return f"in {len(anatomy.attentions)} attentions {keys}" if grid.heads == 1 else f"{heads}, and {keys}"
