"""A report of what a plan will do, computed from shapes."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch.nn import Parameter

from treering.core.sharded import local_rows
from treering.core.topology import AXES, axis_size
from treering.objectives import CrossEntropy
from treering.plan.conflicts import name_of
from treering.plan.plan import Plan
from treering.plan.teacher import teacher_of
from treering.technique import Workload


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Bytes on this rank, before activations. The optimizer is AdamW's two moments in the parameter's dtype."""

    parameters: int  # how many the complete model has
    trained: int  # how many of them are trained
    stored: int
    gradients: int
    optimizer: int


def figures(plan: Plan) -> Figures:
    """Return the bytes that `plan` needs on this rank, from shapes."""
    counts = dict.fromkeys(("parameters", "trained", "stored", "gradients", "optimizer"), 0)
    # Buffers count as well: bases that a technique keeps can be as large as weights.
    for parameter in (*plan.model.parameters(), *plan.model.buffers()):
        total = parameter.numel()
        start, stop = local_rows(parameter)
        local = total // max(parameter.shape[0], 1) * (stop - start) if parameter.ndim else total
        size = parameter.element_size()
        counts["stored"] += local * size
        if not isinstance(parameter, Parameter):
            continue
        counts["parameters"] += total
        if parameter.requires_grad:
            counts["trained"] += total
            counts["gradients"] += local * size
            counts["optimizer"] += 2 * local * size
    return Figures(**counts)


def explain(
    plan: Plan,
    lost: Mapping[str, float] | None = None,
    notes: tuple[str, ...] = (),
    *,
    work: Workload | None = None,
) -> str:
    """Return the report: the order of techniques, memory before activations, and communication in a step of `work`
    (default: one micro-batch of 4,096 tokens)."""
    n = figures(plan)
    axes = ", ".join(
        f"{axis}={axis_size(plan.mesh, axis)}" for axis in (*AXES, "expert") if axis_size(plan.mesh, axis) > 1
    )
    lines = [
        f"{plan.source_name} ({plan.anatomy.model_type}, {len(plan.anatomy.blocks)} blocks)",
        f"{n.parameters:,} parameters, {n.trained:,} trained ({100 * n.trained / max(n.parameters, 1):.2f} %), "
        + (f"mesh {axes}" if axes else "one rank"),
        "",
        "applied in this order",
    ]
    for technique, applied in zip(plan.techniques, plan.applied):
        lines.append(f"  {technique.stage.name.lower():<10}{name_of(technique):<12}{'; '.join(applied.notes)}")
    lines.append(f"  objective {_objective(plan)}")
    if plan.unpackable:
        lines.append(f"  not packed: {plan.unpackable}")
    taught = 0 if plan.teacher is None else figures(plan.teacher).stored
    lines += [
        "",
        "on each rank, before activations",
        f"  parameters {size(n.stored)}, gradients {size(n.gradients)}, AdamW state {size(n.optimizer)}, "
        + (f"teacher {size(taught)}, " if taught else "")
        + f"together {size(n.stored + n.gradients + n.optimizer + taught)}",
    ]
    work = work or Workload(tokens=4096)
    lines += _communication(plan, work)
    for technique, applied in zip(plan.techniques, plan.applied):
        for line in applied.compared(work) if applied.compared is not None else ():
            lines.append(f"  {name_of(technique):<10}{line}")
    if lost:
        worst = max(lost, key=lambda name: lost[name])
        lines.append(
            f"  {len(lost)} weights are stored in parts; largest reconstruction error {lost[worst]:.1e} ({worst})"
        )
    if text := unused(plan):
        lines.append(f"  {text}")
    warnings = [warning for applied in plan.applied for warning in applied.warnings]
    return "\n".join([*lines, *(f"  {note}" for note in (*plan.notes, *warnings, *notes))])


def _objective(plan: Plan) -> str:
    """Return what is minimized, and by which teacher if there is one."""
    if plan.objective == CrossEntropy():
        return "cross-entropy with the label of each trained token"
    text = repr(plan.objective)
    if plan.teacher is not None:
        teacher = plan.teacher
        count = figures(teacher).parameters
        text += f"; the teacher is a frozen {teacher.anatomy.model_type} model of {count:,} parameters"
    elif teacher_of(plan.objective) is not None:
        text += "; the teacher is this model without what it trains"
    return text


def _communication(plan: Plan, work: Workload) -> list[str]:
    """Return a line for each kind of message, and no line where nothing is sent."""
    messages = plan.messages(work)
    if not messages:
        return []
    batches = "1 micro-batch" if work.micro_batches == 1 else f"{work.micro_batches} micro-batches"
    lines = ["", f"sent by each rank in a step of {batches} of {work.tokens:,} tokens, in a ring"]
    for name, message in messages:
        lines.append(
            f"  {name:<10}{message.kind:<15}{size(round(message.sent)):>10} of {message.content} in {message.calls:,} "
            f"calls over {' × '.join(message.axes)}"
        )
    return lines


def unused(plan: Plan, most: int = 6) -> str:
    """Return one line with the tensors of the source that nothing uses; empty if there are none."""
    names = plan.source.unused if plan.source is not None else ()
    if not names:
        return ""
    groups = Counter(re.sub(r"\d+", "*", name) for name in names)
    for parts in (4, 3, 2, 1):  # the longest common beginnings that are few enough to list
        if len(groups) <= most:
            break
        groups = Counter(_beginning(name, parts) for name in names)
    shown = [name if number == 1 else f"{name} ({number:,})" for name, number in groups.most_common(most)]
    more = [f"and {sum(groups.values()) - sum(n for _, n in groups.most_common(most)):,} more"] * (len(groups) > most)
    return (
        f"{len(names):,} of the folder's tensors have no place in this model (not read, not trained, not exported): "
        + ", ".join([*shown, *more])
    )


def _beginning(name: str, parts: int) -> str:
    words = name.split(".")
    return re.sub(r"\d+", "*", ".".join(words[:parts])) + (".*" if len(words) > parts else "")


def size(count: int) -> str:
    """Return a number of bytes as text: 512 B, 3.2 KiB, 15.0 GiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError
