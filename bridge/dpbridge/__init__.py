"""Differentially private training for PyTorch users, computed by JAX."""

import importlib
from typing import Any

from dpbridge import accounting
from dpbridge._compat import keep_freed_memory, share_the_gpu
from dpbridge.budget import PrivacyBudgetExceeded
from dpbridge.check import check
from dpbridge.config import DPConfig
from dpbridge.exchange import jax2torch, to_jax, to_torch
from dpbridge.findings import Finding, Report
from dpbridge.fix import fix
from dpbridge.gradient_computer import DpsgdGradientComputer
from dpbridge.jax_module import JaxModule
from dpbridge.ledger import Ledger
from dpbridge.loaders import PoissonLoader
from dpbridge.lowering import register_lowering
from dpbridge.optimizer import DPOptimizer
from dpbridge.plan_loader import PlanLoader
from dpbridge.private import make_private, make_public
from dpbridge.scaling import scale_then_privatize
from dpbridge.train import TrainingState, train

share_the_gpu()
keep_freed_memory()

__version__ = "0.1.0"

__all__ = [
    "DPConfig",
    "DPOptimizer",
    "DpsgdGradientComputer",
    "Finding",
    "JaxModule",
    "Ledger",
    "PlanLoader",
    "PoissonLoader",
    "PrivacyBudgetExceeded",
    "Report",
    "TrainingState",
    "accounting",
    "check",
    "fix",
    "jax2torch",
    "make_private",
    "make_public",
    "register_lowering",
    "scale_then_privatize",
    "to_jax",
    "to_torch",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports `dpbridge.lightning` when it is asked for: Lightning is not needed otherwise."""
    if name == "lightning":
        return importlib.import_module("dpbridge.lightning")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
