"""Second moments of the inputs and output gradients of a model's layers: measured, added up, kept on disk.

with observe(model, anatomy) as seen: model(...)     in any loop
statistics = measure(model, batches, to="old")       complete measurements, on one rank or many
statistics = open("old");  add(["old", "new"], to="both")
factors = measure(model, batches, gradients=GradientSettings(kind="ekfac")).gradients
"""

from treering.curvature.adding import add
from treering.curvature.disk import open_folder as open
from treering.curvature.factors import GradientFactors, GradientSettings
from treering.curvature.measuring import measure
from treering.curvature.observe import Observer, observe
from treering.curvature.statistics import Ring, Statistics

__all__ = ["GradientFactors", "GradientSettings", "Observer", "Ring", "Statistics", "add", "measure", "observe", "open"]
