"""Opacus, in each of its ways to per-example gradients."""

import warnings
from typing import Any, ClassVar

import torch

from benchmarks.contenders.base import Contender
from benchmarks.task import Gradients, Task


class _Opacus(Contender):
    """Per-example gradients by hooks or otherwise; then its optimizer clips and sums them.

    A module that Opacus does not take is replaced as its own `ModuleValidator.fix` does it:
    `nn.LSTM` by its `DPLSTM`.
    """

    is_private = True
    mode: ClassVar[str]

    def __init__(self, task: Task) -> None:
        from opacus.grad_sample.utils import wrap_model
        from opacus.optimizers import get_optimizer_class
        from opacus.validators import ModuleValidator

        warnings.filterwarnings("ignore", "Full backward hook", UserWarning)
        model = task.model()
        if not ModuleValidator.is_valid(model):
            model = ModuleValidator.fix(model)
            self.note = "with the modules of ModuleValidator.fix"
        self._module = wrap_model(model, self.mode, **self._settings(task))
        optimizer_class = get_optimizer_class("flat", False, self.mode)
        trainable = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = optimizer_class(
            torch.optim.SGD(trainable, lr=0.0),
            noise_multiplier=0.0,
            max_grad_norm=task.l2_clip_norm,
            expected_batch_size=task.row.batch_size,
        )
        self._loss_fn: Any = task.row.make_loss()
        self._batch = task.inputs, task.targets
        self._names = {id(p): name for name, p in model.named_parameters()}

    def _settings(self, task: Task) -> dict[str, Any]:
        return {}

    def __call__(self) -> None:
        inputs, targets = self._batch
        self._optimizer.zero_grad(set_to_none=True)
        self._loss_fn(self._module(inputs), targets).backward()
        self._optimizer.clip_and_accumulate()

    def gradients(self) -> Gradients:
        return {self._names[id(p)]: p.summed_grad.numpy() for p in self._optimizer.params}

    def clear(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)


class Hooks(_Opacus):
    title = "Opacus, hooks"
    mode = "hooks"


class Functorch(_Opacus):
    title = "Opacus, functorch"
    mode = "functorch"


class ExpandedWeights(_Opacus):
    title = "Opacus, expanded weights"
    mode = "ew"


class Ghost(_Opacus):
    """Norms in a first backward pass, and the weighted loss in a second."""

    title = "Opacus, ghost"
    mode = "ghost"

    def __init__(self, task: Task) -> None:
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        super().__init__(task)
        self._loss_fn = DPLossFastGradientClipping(self._module, self._optimizer, self._loss_fn)

    def _settings(self, task: Task) -> dict[str, Any]:
        return {"max_grad_norm": task.l2_clip_norm}

    def __call__(self) -> None:
        inputs, targets = self._batch
        self._optimizer.zero_grad(set_to_none=True)
        self._loss_fn(self._module(inputs), targets).backward()

    def gradients(self) -> Gradients:
        return {self._names[id(p)]: p.grad.numpy() for p in self._optimizer.params}
