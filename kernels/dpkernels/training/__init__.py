"""The training loop of a plan: every draw is one step, and there are no others."""

from dpkernels.training.loop import train
from dpkernels.training.state import TrainingState

__all__ = ["TrainingState", "train"]
