"""Measuring a model: embed a part of the data, measure retrieval in it, present it."""

from abe_jax.evaluate.measure import METRICS, Metric, measure
from abe_jax.evaluate.present import scalars, show, table, write
from abe_jax.evaluate.run import (
    Evaluation,
    Evaluator,
    measure_checkpoint,
)

__all__ = [
    "METRICS",
    "Evaluation",
    "Evaluator",
    "Metric",
    "measure",
    "measure_checkpoint",
    "scalars",
    "show",
    "table",
    "write",
]
