"""The techniques `tiledmlp`, `tiledblock` and `tiledloss`: computation on a tile of tokens at a time."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from treering.core.errors import PlanError
from treering.core.topology import axis_size
from treering.technique import Applied, Claim, Site, Stage, Variant
from treering.techniques.tiling.settings import TiledBlockSettings, TiledLossSettings, TiledMLPSettings

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from treering.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class TiledMLP(TiledMLPSettings):
    """Compute the feed-forward part of every block on a tile of tokens at a time, and once more in the backward.

    tile        tokens in a tile at most; `budget`: what a tile needs fits into `budget`; `hidden`: as many tokens as
                the model is wide (what DeepSpeed, Liger and axolotl's first version do)
    budget      GiB for one tile
    experts     `tokens`: stacked experts see a tile of tokens at a time; `groups`: all tokens, but a group of experts
                at a time, so that no gradient is a sum of several. A group has the rows of all experts, so that it
                needs more memory: for weight gradients that are seen once, not for longer rows
    accumulate  in what the gradient of a weight is summed over tiles: float32 (or wider); the dtype of the parameter,
                whose rounding grows with the number of tiles; `budget`: float32 where such sums fit into `budget`

    Example:
        run = tr.compose("MODEL", [tr.Full(), tr.TiledMLP(budget=0.5)])
    """

    stage: ClassVar[Stage] = Stage.FORWARD

    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> list[Claim]:
        _check_assigned(self, mesh, "tiledmlp")
        return _forwards(_mlps(anatomy, "tiledmlp"), "tiledmlp")

    def apply(self, model: "nn.Module", site: Site) -> Applied:
        from treering.techniques.tiling.mlp import install_mlps

        return install_mlps(model, self, site)

    def for_teacher(self, student: "Anatomy", mesh: "DeviceMesh | None") -> "TiledMLP":
        """Return this: the feed-forward part of a teacher needs as much memory."""
        return self


@dataclass(frozen=True, kw_only=True)
class TiledBlock(TiledBlockSettings):
    """Compute all of a block but its attention in tiles: norm, MLP and residual together, and norm with q, k and v.

    tile        as in `tiledmlp`, which this contains
    budget      GiB for one tile
    experts     as in `tiledmlp`
    accumulate  as in `tiledmlp`

    Example:
        run = tr.compose("MODEL", [tr.Full(), tr.TiledBlock(), tr.Recompute()])
    """

    stage: ClassVar[Stage] = Stage.FORWARD

    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> list[Claim]:
        _check_assigned(self, mesh, "tiledblock")
        for block in anatomy.blocks:
            if block.attention is None or block.mixer != "attention":
                raise PlanError(
                    f"tiledblock: tokens of {block.fqn} meet in {block.mixer_class}, and only blocks of attention and "
                    f"a feed-forward part are known; {_other_tiles(anatomy)}",
                    settings=("tiledblock",),
                )
        inner = [
            name
            for name in anatomy.norms
            for block in anatomy.blocks
            if name.startswith(f"{block.fqn}.") and "." not in name.removeprefix(f"{block.fqn}.")
        ]
        attentions = [block.attention for block in anatomy.blocks if block.attention is not None]
        return _forwards([*_mlps(anatomy, "tiledblock"), *inner, *attentions], "tiledblock")

    def apply(self, model: "nn.Module", site: Site) -> Applied:
        from treering.techniques.tiling.block import install_blocks

        return install_blocks(model, self, site)

    def for_teacher(self, student: "Anatomy", mesh: "DeviceMesh | None") -> "TiledBlock":
        """Return this: all of a teacher's block needs as much memory."""
        return self

    @classmethod
    def lighter(cls) -> tuple[Variant, ...]:
        """Return tiled blocks, in the place of tiled MLPs."""
        config = "tiledblock:  # in the place of tiledmlp"
        of = lambda now: None if now else cls()  # noqa: E731
        return (Variant(name="tiled blocks", config=config, order=30, of=of, replaces=("tiledmlp",)),)


@dataclass(frozen=True, kw_only=True)
class TiledLoss(TiledLossSettings):
    """Compute head and objective on a tile of trained tokens at a time: logits of a complete sequence never exist.

    tile             tokens in a tile at most; `budget`: what a tile's logits need fits into `budget`
    budget           GiB for one tile; null: 1, or what 2,048 tokens need where the head trains: with shorter tiles, its
                     gradient, summed once a tile, takes about as long as the products
    label_smoothing  that much of the target is spread evenly over the vocabulary
    z_loss           adds z_loss · (log Σ exp logits)² for each trained token, which keeps logits small. Held-out
                     documents are evaluated without both; the complete objective is reported as `objective`
    accumulate       as in `tiledmlp`, for the gradient of the head

    Example:
        run = tr.compose("MODEL", [tr.LoRA(rank=16), tr.TiledLoss()])
    """

    stage: ClassVar[Stage] = Stage.FORWARD

    def claims(self, anatomy: "Anatomy", mesh: "DeviceMesh | None") -> list[Claim]:
        head = anatomy.head
        if head is None or head.unknown:
            what = "it has no head" if head is None else f"its forward uses {', '.join(head.unknown)}"
            raise PlanError(
                f"tiledloss: what this {anatomy.model_type} model does to its logits is not understood ({what}); "
                "leave tiledloss out",
                settings=("tiledloss",),
            )
        return [
            Claim(fqn=head.fqn, aspect="loss", needs=("no_fsdp_unit_inside",), setting="tiledloss"),
            Claim(fqn=head.fqn, aspect="forward", setting="tiledloss"),
        ]

    def apply(self, model: "nn.Module", site: Site) -> Applied:
        from treering.techniques.tiling.losses import install_loss

        return install_loss(model, self, site)

    @classmethod
    def lighter(cls) -> tuple[Variant, ...]:
        """Return the tiled loss."""
        return (Variant(name="a tiled loss", config="tiledloss:", order=10, of=lambda now: None if now else cls()),)


def _check_assigned(config: TiledMLPSettings | TiledBlockSettings, mesh: "DeviceMesh | None", setting: str) -> None:
    """Refuse groups of experts where each rank has some of them: its groups would not be those of other ranks."""
    if config.experts == "groups" and axis_size(mesh, "expert") > 1:
        raise PlanError(
            f"{setting}: the mesh has expert={axis_size(mesh, 'expert')}, and experts that are assigned to ranks are "
            f"not run in groups. Set {setting}.experts to tokens",
            settings=(f"{setting}.experts", "mesh.expert"),
        )


def _mlps(anatomy: "Anatomy", setting: str) -> list[str]:
    """Return the modules whose forward is replaced, as far as the anatomy distinguishes them."""
    from treering.techniques.tiling.mlp import feed_forward

    stacked = [experts.fqn for experts in anatomy.experts]
    linears = {linear.fqn for linear in anatomy.linears}
    parts = {block.fqn: feed_forward(anatomy, block) for block in anatomy.blocks}
    pieces = [fqn for fqn, names in parts.items() if linears.intersection(names)]
    dense = [one for names in parts.values() for one in names if not any(e.startswith(one) for e in stacked)]
    unknown = [block.fqn for block in anatomy.blocks if block.mixer == "attention" and not parts[block.fqn]]
    if setting == "tiledmlp" and pieces:
        raise PlanError(
            f"tiledmlp: the feed-forward part of {pieces[0]} of this {anatomy.model_type} model is not one module, but "
            f"{', '.join(name.rpartition('.')[2] for name in parts[pieces[0]])}, which only all of a block in tiles "
            "has in one tile; use tiledblock instead",
            settings=("tiledmlp",),
        )
    if unknown or not (stacked or dense):
        raise PlanError(
            f"{setting}: the feed-forward part of {unknown[0] if unknown else 'the blocks'} of this "
            f"{anatomy.model_type} model was not found, and cannot be tiled; leave {setting} out "
            f"({_instead(anatomy)})",
            settings=(setting,),
        )
    return [*dense, *stacked]


def _other_tiles(anatomy: "Anatomy") -> str:
    """Return what to write in the place of tiledblock."""
    try:
        _mlps(anatomy, "tiledmlp")
    except PlanError:
        return f"leave tiledblock out ({_instead(anatomy)})"
    return "use tiledmlp instead"


def _instead(anatomy: "Anatomy") -> str:
    """Return which techniques make this model need less memory, where its blocks cannot be tiled."""
    tiled_loss = anatomy.head is not None and not anatomy.head.unknown
    return f"recompute{' and tiledloss' if tiled_loss else ''} can be used with it"


def _forwards(names: list[str], setting: str) -> list[Claim]:
    return [Claim(fqn=name, aspect="forward", needs=("no_fsdp_unit_inside",), setting=setting) for name in names]
