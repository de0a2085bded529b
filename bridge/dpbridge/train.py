"""The loop: a plan, a dataset, a model, and nothing to forget."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from dpbridge.optimizer import DPOptimizer
from dpbridge.plan_ledger import PlanLedger
from dpbridge.plan_loader import PlanLoader
from dpbridge.scaling import ScaledOptimizer
from dpbridge.trainable import device_of
from dpkernels.execution_plan import DPExecutionPlan


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Where a run stands.

    Attributes:
        model: The module.
        optimizer: Its private optimizer, with the ledger.
        loader: Where its batches come from.
    """

    model: nn.Module
    optimizer: DPOptimizer
    loader: PlanLoader

    @property
    def step(self) -> int:
        """How many steps of the plan were made, those apart that a crash took back."""
        ledger = self.optimizer.ledger
        assert isinstance(ledger, PlanLedger)
        return ledger.position

    def epsilon(self, delta: float, *, accountant: str | None = None) -> float:
        """Returns the epsilon spent so far; see `DPOptimizer.epsilon`."""
        return self.optimizer.epsilon(delta, accountant=accountant)

    def state_dict(self) -> dict[str, Any]:
        """Returns all that `train` needs to go on, for `torch.save`.

        It holds the seeds of noise and sampling: keep it as secret as the data.
        """
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.loader.load_state_dict(state["loader"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.model.load_state_dict(state["model"])


def train(
    plan: DPExecutionPlan,
    dataset: Any,
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    optimizer: Optimizer | ScaledOptimizer,
    *,
    callback: Callable[[TrainingState, torch.Tensor], Any] | None = None,
    resume: Mapping[str, Any] | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
    journal: str | os.PathLike[str] | None = None,
    progress: bool = True,
    seed: int | None = None,
    **loading: Any,
) -> TrainingState:
    """Trains a model as a plan says, all of its steps.

    Args:
        plan: How batches are drawn, clipped and noised, and how many steps there are.
        dataset: A map-style dataset. What it yields are the arguments of
            `DPOptimizer.backward`: a tuple of inputs and, last, the target, or a dict.
        model: The module, on the device to train on; batches are moved there.
        loss_fn: As in `DPOptimizer`.
        optimizer: Any torch optimizer over its parameters, or what `scale_then_privatize` makes of
            one.
        callback: Called after each step with the state and the batch's mean loss, which is not
            private. A true return value ends training.
        resume: What `TrainingState.state_dict` returned, to go on from there.
        epsilon: As in `DPOptimizer`.
        delta: As in `DPOptimizer`.
        journal: As in `DPOptimizer`.
        progress: Whether to show a bar.
        seed: Of sampling and dropout, for tests; by default the operating system's. That of the
            noise is the plan's.
        **loading: `collate_fn`, `num_workers` and so on: those of `PlanLoader`.

    Returns:
        The state after the last step.

    Raises:
        TypeError, ValueError: As `DPOptimizer` and `PlanLoader`.

    Example:
        >>> from dpkernels.execution_plan import DPSGDConfig
        >>> dataset = torch.utils.data.TensorDataset(torch.randn(100, 2), torch.randn(100, 1))
        >>> config = DPSGDConfig(
        ...     iterations=5, sampling_prob=0.1, noise_multiplier=2.0, normalize_by=10)
        >>> model = nn.Linear(2, 1)
        >>> state = train(
        ...     config.make(), dataset, model, nn.MSELoss(),
        ...     torch.optim.SGD(model.parameters(), lr=0.1), progress=False)
        >>> state.step, state.epsilon(1e-3) < 1
        (5, True)
    """
    loader = PlanLoader(plan, dataset, seed=seed, **loading)
    private = DPOptimizer(
        optimizer,
        model,
        loss_fn=loss_fn,
        plan=plan,
        loader=loader,
        epsilon=epsilon,
        delta=delta,
        journal=journal,
        seed=seed,
    )
    state = TrainingState(model, private, loader)
    if resume is not None:
        state.load_state_dict(resume)
    if state.step < plan.iterations:
        _run(state, callback, progress)
    return state


def _run(
    state: TrainingState,
    callback: Callable[[TrainingState, torch.Tensor], Any] | None,
    progress: bool,
) -> None:
    optimizer, parts = state.optimizer, state.loader.accumulation_steps
    device = device_of(state.model)
    steps = len(state.loader) // parts
    losses: list[torch.Tensor] = []
    with tqdm(total=steps, initial=state.step, disable=not progress, unit="step") as bar:
        for batch in state.loader:
            losses.append(_backward(optimizer, batch, device))
            if len(losses) < parts:
                continue
            optimizer.step()
            optimizer.zero_grad()
            loss = torch.stack(losses).mean()
            losses = []
            bar.update()
            if callback is not None and callback(state, loss):
                break


def _backward(optimizer: DPOptimizer, batch: Any, device: torch.device) -> torch.Tensor:
    batch = jax.tree.map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, batch)
    if isinstance(batch, Mapping):
        return optimizer.backward(**batch)
    if isinstance(batch, (tuple, list)):
        return optimizer.backward(*batch)
    return optimizer.backward(batch)
