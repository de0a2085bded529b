"""Gradients that reach a parameter by another way than the private one."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Regularizer = Callable[[nn.Module], torch.Tensor]


class ForeignGradients:
    """Watches parameters, and lets through what a regularizer of the weights alone explains.

    Args:
        model: Whose parameters to watch.
        regularizer: Returns a scalar of the model's weights, or None. It is given nothing else,
            so that its gradient cannot depend on the data, and is added after the noise.
    """

    def __init__(self, model: nn.Module, regularizer: Regularizer | None) -> None:
        self._model, self._regularizer = model, regularizer
        self._found: dict[str, torch.Tensor] = {}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(name))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    def _hook(self, name: str) -> Callable[[torch.Tensor], None]:
        def receive(parameter: torch.Tensor) -> None:
            grad, parameter.grad = parameter.grad, None
            if self._regularizer is None or grad is None:
                raise RuntimeError(
                    f"`{name}` must get its gradient from the model's own forward in training "
                    "mode, got one by another way: a term of the loss that uses the weights, a "
                    "part of the model called by itself, or model.eval(). It would bypass "
                    "clipping and noise. Call model.train() and the model as a whole, with what "
                    "calls its parts in forward; for a penalty on the weights pass `regularizer`."
                )
            self._found[name] = self._found[name] + grad if name in self._found else grad

        return receive

    def discard(self) -> None:
        """Forgets what was found since the last step."""
        self._found = {}

    def gradients(self, trainable: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Returns what is to be added to the noised gradients, and forgets what was found.

        Raises:
            RuntimeError: If other gradients were found than those of the regularizer.
        """
        found, self._found = self._found, {}
        if self._regularizer is None:
            return {}
        own = self._own(trainable)
        for name, grad in found.items():
            expected = own.get(name, torch.zeros_like(grad))
            if not torch.allclose(grad, expected, rtol=1e-4, atol=1e-6 * float(expected.norm())):
                raise RuntimeError(
                    f"`{name}` must get no gradient but its private one and that of "
                    "`regularizer`, got another. Leave the term out of the loss, or make "
                    "`regularizer` return that very term; call zero_grad() before backward."
                )
        return own

    def _own(self, trainable: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        assert self._regularizer is not None
        with torch.enable_grad():
            value = self._regularizer(self._model)
        _check_scalar(value)
        if not value.requires_grad:
            return {}
        weights = list(trainable.values())
        grads = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
        return dict(zip(trainable, grads, strict=True))

    def remove(self) -> None:
        """Stops watching."""
        for hook in self._hooks:
            hook.remove()


def _check_scalar(value: Any) -> None:
    if not isinstance(value, torch.Tensor) or value.ndim or not value.is_floating_point():
        raise TypeError(
            f"`regularizer` must return a scalar tensor, got {value!r:.80}. Return for example "
            "1e-4 * sum(p.square().sum() for p in model.parameters())."
        )
