"""Differentially private training for PyTorch users, computed by JAX."""

from dpbridge import accounting
from dpbridge._compat import share_the_gpu
from dpbridge.exchange import jax2torch, to_jax, to_torch
from dpbridge.ledger import Ledger
from dpbridge.loaders import PoissonLoader
from dpbridge.lowering import register_lowering
from dpbridge.optimizer import DPOptimizer

share_the_gpu()

__version__ = "0.1.0"

__all__ = [
    "DPOptimizer",
    "Ledger",
    "PoissonLoader",
    "accounting",
    "jax2torch",
    "register_lowering",
    "to_jax",
    "to_torch",
]
