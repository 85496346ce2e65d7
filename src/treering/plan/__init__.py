from treering.plan.compose import compose, draft, load
from treering.plan.plan import Plan
from treering.plan.run import Run
from treering.plan.step import StepReport

__all__ = ["Plan", "Run", "StepReport", "compose", "draft", "load"]
