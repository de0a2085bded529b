"""Small models in plain JAX, one for each way in which a parameter can meet data."""

from kernel_models import (
    convolution,
    dense,
    derived,
    indexing,
    loops,
    programs,
    scaling,
    sharing,
)
from kernel_models.base import BATCH, Model

FAMILIES = (
    dense.dense,
    convolution.conv,
    indexing.indexing,
    scaling.scaling,
    derived.derived,
    sharing.sharing,
    loops.loops,
    programs.programs,
)

MODELS: dict[str, Model] = {}
for family in FAMILIES:
    MODELS.update(family)

__all__ = ["BATCH", "FAMILIES", "MODELS", "Model"]
