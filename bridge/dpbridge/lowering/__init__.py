"""Torch modules to JAX: a training program, exported for one example, written in `jax.numpy`."""

from dpbridge.lowering.program import Program, loss_of_example, lower, lower_outputs
from dpbridge.lowering.table import Call, load_families, register_lowering, supported_ops

__all__ = [
    "Call",
    "Program",
    "loss_of_example",
    "lower",
    "lower_outputs",
    "register_lowering",
    "supported_ops",
]

load_families()
