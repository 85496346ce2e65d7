"""Objectives: what a run minimizes, a sum over its trained positions of a function of one row of logits each."""

from treering.objectives.distill import Distill
from treering.objectives.objective import (
    IGNORED,
    INPUTS,
    CrossEntropy,
    Objective,
    ObjectiveRows,
    Scores,
    TeacherStates,
    objective_values,
    score_names,
    widened,
)
from treering.objectives.output_head import OutputHead

__all__ = [
    "IGNORED",
    "INPUTS",
    "CrossEntropy",
    "Distill",
    "Objective",
    "ObjectiveRows",
    "OutputHead",
    "Scores",
    "TeacherStates",
    "objective_values",
    "score_names",
    "widened",
]
