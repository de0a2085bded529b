"""Training without privacy, as torch does it: forward and `loss.backward()`."""

import torch
from torch import nn

from benchmarks.contenders.base import Contender
from benchmarks.task import Gradients, Task


class PlainTorch(Contender):
    """Eager."""

    title = "torch, eager, not private"
    is_private = False

    def __init__(self, task: Task) -> None:
        self._model = task.model()
        self._forward: nn.Module = self._model
        self._loss_fn = task.row.make_loss()
        self._batch = task.inputs, task.targets

    def __call__(self) -> None:
        inputs, targets = self._batch
        self._model.zero_grad(set_to_none=True)
        self._loss_fn(self._forward(inputs), targets).backward()

    def gradients(self) -> Gradients:
        named = self._model.named_parameters()
        return {name: p.grad.numpy() for name, p in named if p.grad is not None}

    def clear(self) -> None:
        self._model.zero_grad(set_to_none=True)


class CompiledTorch(PlainTorch):
    """`torch.compile` of the model."""

    title = "torch.compile, not private"
    is_watchable = False

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        torch._dynamo.reset()
        self._forward = torch.compile(self._model)
