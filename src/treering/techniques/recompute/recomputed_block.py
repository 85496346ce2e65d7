"""A block that is run again in the backward: its forward, replaced on the instance."""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from treering.core.errors import PlanError
from treering.core.module_forward import ModuleForward
from treering.technique import Applied, Site, recomputing
from treering.techniques.recompute.offload import Offload
from treering.techniques.recompute.settings import read_bytes

if TYPE_CHECKING:
    from treering.techniques.recompute.settings import RecomputeSettings

IN_PLACE = ("alltoall_base_", "alltoall_")  # of c10d: they fill a tensor that they are given

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def install(model: nn.Module, config: "RecomputeSettings", site: Site) -> Applied:
    """Replace the forward of every block by one that is run again in the backward."""
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise PlanError(
            "recompute: the model recomputes its blocks already; call model.gradient_checkpointing_disable() before, "
            "or leave recompute out",
            settings=("recompute",),
        )
    blocks = site.anatomy.blocks
    engine = None
    if config.offload == "cpu":
        budget = None if config.budget is None else read_bytes(config.budget)
        engine = Offload(tuple(block.fqn for block in blocks), config.first_blocks, budget, config.prefetch)
    regions = [
        RecomputedBlock(model.get_submodule(b.fqn), b.fqn, i, config.keep, b.attention is not None, engine)
        for i, b in enumerate(blocks)
    ]

    def undo() -> None:
        for region in regions:
            region.remove()
        if engine is not None:
            engine.clear()

    notes = [f"{len(blocks)} blocks are computed again in the backward"]
    if config.keep:
        notes.append(f"kept: {', '.join(config.keep)}")
    if engine is not None:
        limit = "" if config.budget is None else f", at most {config.budget} a rank"
        notes.append(f"inputs of {engine.leaving} blocks are offloaded to host memory{limit}")
    return Applied(undo=undo, notes=tuple(notes), metrics=None if engine is None else engine.metrics)


class RecomputedBlock(ModuleForward):
    """Called in place of a block's forward, which may be the module's or a tiled one."""

    def __init__(
        self, block: nn.Module, fqn: str, index: int, keep: tuple[str, ...], attention: bool, engine: Offload | None
    ):
        super().__init__(block)
        self.block, self.fqn, self.index = block, fqn, index
        self.keep, self.attention, self.engine = keep, attention, engine
        self.again = "all_to_all" not in keep
        self.compiled: Callable[..., Any] | None = None
        replaced = vars(block)
        self.before: dict[str, Any] = {name: replaced[name] for name in ("forward", "compile") if name in replaced}
        block.forward = self  # type: ignore[assignment]
        block.compile = self.compile  # type: ignore[method-assign]

    def remove(self) -> None:
        for name in ("forward", "compile"):
            vars(self.block).pop(name, None)
        vars(self.block).update(self.before)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without compiled code: copies of modules that torch compiled are not compiled either."""
        return vars(self) | {"compiled": None}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the body; this replaces `block.compile`.

        Compiled from outside, all of the block would run uncompiled, without a message: torch traces nothing inside a
        checkpoint that has a graph break in it, as attention has.
        """
        if self.keep:
            raise PlanError(
                "recompute and compile: operators inside compiled code cannot be kept one by one; leave keep out of "
                "recompute, or compile out",
                settings=("recompute.keep", "compile"),
            )
        self.compiled = torch.compile(self.former, *args, **kwargs)
        self.block._compiled_call_impl = self.block._call_impl  # a mark; setting it to None again undoes this

    # Traced into, the choice of what is kept would become part of a graph.
    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compiled = self.compiled if self.block._compiled_call_impl is not None else None
        body = self.former if compiled is None else compiled
        if not torch.is_grad_enabled():
            return body(*args, **kwargs)
        self._refuse_cache(args, kwargs)
        hidden, call = self._apart(body, args, kwargs)
        policy = KeepPolicy(self.keep) if self.keep else None
        with self.engine.around(self.index) if self.engine is not None else nullcontext():
            out = checkpoint(call, hidden, use_reentrant=False, context_fn=lambda: _contexts(policy))
        if policy is not None:
            policy.refuse_unless_seen(self.fqn, self.attention)
        return out

    def _apart(
        self, body: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """Return the block's input, and a function of it alone. All other arguments are the same for all blocks."""
        if args and isinstance(args[0], Tensor):
            hidden, after = args[0], args[1:]
            return hidden, lambda x: body(x, *after, **kwargs)
        rest = dict(kwargs)
        hidden = rest.pop("hidden_states", None)
        if args or not isinstance(hidden, Tensor):
            raise PlanError(
                f"recompute: {self.fqn} is called without a tensor as its first argument or as hidden_states, so what "
                "to keep is not known; leave recompute out for this model",
                settings=("recompute",),
            )
        return hidden, lambda x: body(hidden_states=x, **rest)

    def _refuse_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise PlanError for a key-value cache: a second forward would append to it a second time."""
        from transformers import Cache

        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            raise PlanError(
                f"recompute: {self.fqn} got a key-value cache, which a second forward would fill twice; call the model "
                "with use_cache=False (run.loss does), or under torch.no_grad()",
                settings=("recompute",),
            )


def _contexts(policy: "KeepPolicy | None") -> Contexts:
    if policy is None:
        return nullcontext(), SecondPass(nullcontext())
    first, second = policy.contexts()
    return first, SecondPass(second)


class SecondPass:
    """Marks a second forward. Entered as often as there are backwards through one graph."""

    def __init__(self, inner: AbstractContextManager[Any]):
        self.inner = inner
        self.open: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(recomputing("recompute"))
            stack.enter_context(self.inner)
            self.open.append(stack.pop_all())

    def __exit__(self, *problem: Any) -> bool | None:
        return self.open.pop().__exit__(*problem)


class KeepPolicy:
    """The policy of torch's selective checkpoint: which operators' results are kept in one pass through a block, and
    which of them there were."""

    def __init__(self, keep: tuple[str, ...]):
        self.keep = keep
        self.seen: Counter[str] = Counter()

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kind = kind_of(op)
        if kind == "in place" and "all_to_all" in self.keep:
            raise PlanError(
                f"recompute: keep names all_to_all, and {op} fills a tensor that it is given, whose value cannot be "
                "kept; leave all_to_all out of recompute.keep",
                settings=("recompute.keep",),
            )
        if kind not in self.keep:
            return CheckpointPolicy.PREFER_RECOMPUTE
        self.seen[kind] += 1
        return CheckpointPolicy.MUST_SAVE

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Return the contexts of the first pass and of the second."""
        return create_selective_checkpoint_contexts(self)

    def refuse_unless_seen(self, block: str, attention: bool) -> None:
        """Raise PlanError where `keep` had no effect: it would cost the time that it was meant to save."""
        if "attention" in self.keep and attention and not self.seen["attention"]:
            raise PlanError(
                f"recompute: keep names attention, and the attention of {block} ran as many small operators instead "
                "of one kernel whose result could be kept (softcap, sinks, packed windows and unequal head widths do "
                "so on a CPU); leave attention out of recompute.keep",
                settings=("recompute.keep",),
            )


def kind_of(op: Any) -> str:
    """Return `attention`, `all_to_all`, `in place` or nothing, by the operator's name: there are many kernels."""
    space, _, name = str(op.name()).rpartition("::")
    name = name.partition(".")[0]
    if "backward" in name:
        return ""
    if "attention" in name or "attn" in name:
        return "attention"
    if space == "c10d" and name in IN_PLACE:
        return "in place"
    gathers_rows = space == "treering" and name == "all_gather_rows"  # not c10d's, which gather parameters
    return "all_to_all" if gathers_rows or "all_to_all" in name else ""
