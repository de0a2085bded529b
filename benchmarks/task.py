"""What a row asks of its contenders: the same weights, batch and clip norm, and the answer."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from benchmarks.rows import Row

Gradients = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Task:
    """One row, made concrete.

    Attributes:
        row: The row.
        weights: The module; contenders take a copy.
        inputs: The batch's inputs.
        targets: The batch's targets.
        l2_clip_norm: The median of the gradients' norms: half of the examples are clipped.
        clipped_sum: What a private contender should find.
        mean: What a plain one should find.
    """

    row: Row
    weights: nn.Module
    inputs: torch.Tensor
    targets: torch.Tensor
    l2_clip_norm: float
    clipped_sum: Gradients
    mean: Gradients

    def model(self) -> nn.Module:
        """Returns a module of the contender's own."""
        return copy.deepcopy(self.weights)

    def error(self, found: Gradients, is_private: bool) -> float:
        """Returns the relative difference, over all parameters, from what should be found."""
        expected = self.clipped_sum if is_private else self.mean
        wrong = [
            np.sum((found[name] - value) ** 2, dtype=np.float64) for name, value in expected.items()
        ]
        right = [np.sum(value**2, dtype=np.float64) for value in expected.values()]
        return float(np.sqrt(np.sum(wrong) / np.sum(right)))


def make_task(row: Row, seed: int = 0) -> Task:
    """Draws weights and batch, and works out the answers by torch, one example at a time."""
    torch.manual_seed(seed)
    model, loss_fn = row.make_model(), row.make_loss()
    inputs, targets = row.make_batch(row.batch_size)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    norms = []
    for i in range(row.batch_size):
        loss = loss_fn(model(inputs[i : i + 1]), targets[i : i + 1])
        grads = torch.autograd.grad(loss, list(parameters.values()))
        norms.append(torch.stack([grad.norm() for grad in grads]).norm())
    norm = torch.stack(norms)
    clip = float(norm.median())

    loss_fn.reduction = "none"
    losses = loss_fn(model(inputs), targets)
    answers = []
    for weights in ((clip / norm).clamp(max=1), torch.full_like(norm, 1 / row.batch_size)):
        grads = torch.autograd.grad(
            (weights * losses).sum(), list(parameters.values()), retain_graph=True
        )
        pairs = zip(parameters, grads, strict=True)
        answers.append({name: grad.numpy() for name, grad in pairs})
    return Task(row, model, inputs, targets, clip, *answers)
