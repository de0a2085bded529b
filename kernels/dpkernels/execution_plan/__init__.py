"""Plans: sampling, clipping, noise and accounting that belong together, made from a config."""

from dpkernels.execution_plan.bandmf import BandMFConfig
from dpkernels.execution_plan.config import ExecutionPlanConfig, PrivateConfig
from dpkernels.execution_plan.dpsgd import DPSGDConfig
from dpkernels.execution_plan.nonprivate import NonPrivateConfig
from dpkernels.execution_plan.performance import PerformanceFlags
from dpkernels.execution_plan.plan import DPExecutionPlan
from dpkernels.execution_plan.serialization import config_from_dict, config_to_dict

__all__ = [
    "BandMFConfig",
    "DPExecutionPlan",
    "DPSGDConfig",
    "ExecutionPlanConfig",
    "NonPrivateConfig",
    "PerformanceFlags",
    "PrivateConfig",
    "config_from_dict",
    "config_to_dict",
]
