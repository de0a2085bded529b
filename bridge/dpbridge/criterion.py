"""Probe a loss for whether one example's share of it depends on the others."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from dpbridge.empty_draws import preserved_random_state
from dpbridge.outputs import tensors_in
from dpbridge.private_forward import plain_forward
from dpbridge.trainable import is_module_class
from dpbridge.untouched import untouched

_EXAMPLES = 8


def check_criterion(
    criterion: Callable[..., Any],
    model: nn.Module,
    loader: DataLoader[Any],
    *,
    is_mean: bool = True,
) -> None:
    """Compares the loss of a few examples with those of each by itself.

    The gradient by the outputs of example i must be that of the loss of example i alone, over
    the number of examples for a mean. It is asked of the first examples of the dataset, with the
    model's outputs and with larger ones, of all of them and of some.

    Args:
        criterion: Called as `criterion(output, target)`.
        model: Called on all of a batch but the last.
        loader: Whose batches are tuples with the target last.
        is_mean: Whether it is a mean over the examples, or a sum.

    Raises:
        TypeError: If the criterion is not callable, a batch is not a tuple or list of inputs and
            a target, or the model does not return one tensor.
        ValueError: If the criterion mixes examples, or returns no scalar.
    """
    given: Any = criterion
    if not callable(given) or is_module_class(given):
        raise TypeError(
            f"`criterion` must be callable, got {criterion!r:.80}. Pass the loss itself: "
            "nn.CrossEntropyLoss(), with its brackets."
        )
    count = min(_EXAMPLES, len(loader.dataset))  # type: ignore[arg-type]
    with preserved_random_state(), plain_forward(), untouched(model):
        batch = loader.collate_fn([loader.dataset[i] for i in range(count)])
        *inputs, target = _checked(batch)
        with torch.no_grad():
            output = model(*inputs)
        if not isinstance(output, torch.Tensor):
            raise TypeError(
                "`criterion` can be probed where the model returns one tensor, got "
                f"{type(output).__name__}. Leave `criterion` out, and use optimizer.backward if "
                "the loss might mix examples."
            )
        for scale in (1.0, 30.0):
            for rows in (slice(None), slice(0, math.ceil(count / 2))):
                own = output[rows] * scale
                _compare(criterion, own, _rows(target, rows), is_mean)


def _checked(batch: Any) -> tuple[Any, ...]:
    if not isinstance(batch, (list, tuple)) or len(batch) < 2:
        raise TypeError(
            f"`criterion` can be probed where a batch is (*inputs, target), got "
            f"{type(batch).__name__}. Leave `criterion` out, and use optimizer.backward if the "
            "loss might mix examples."
        )
    return tuple(batch)


def _compare(
    criterion: Callable[..., Any], output: torch.Tensor, target: Any, is_mean: bool
) -> None:
    together = _gradient(criterion, output, target)
    for i in range(len(output)):
        row = slice(i, i + 1)
        alone = _gradient(criterion, output[row], _rows(target, row))
        expected = alone / len(output) if is_mean else alone
        error = (together[row] - expected).double().norm()
        if not error <= 1e-3 * expected.double().norm() + 1e-12:
            raise ValueError(
                "`criterion` must be a "
                f"{'mean' if is_mean else 'sum'} over examples that does not mix them, got a "
                f"gradient for example {i} that is not its own. Class weights, ignored targets "
                "and losses over pairs do this: use reduction='sum' or optimizer.backward(x, y), "
                "which takes the loss of each example by itself; see `loss_reduction`."
            )


def _gradient(criterion: Callable[..., Any], output: torch.Tensor, target: Any) -> torch.Tensor:
    leaf = output.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = criterion(leaf, target)
    if not isinstance(value, torch.Tensor) or value.ndim or not value.requires_grad:
        raise ValueError(
            f"`criterion` must return a scalar of the model's output, got {value!r:.80}. Take its "
            "mean."
        )
    (grad,) = torch.autograd.grad(value, leaf)
    return grad


def _rows(target: Any, rows: slice) -> Any:
    if isinstance(target, torch.Tensor):
        return target[rows]
    if isinstance(target, Mapping):
        return {name: _rows(part, rows) for name, part in target.items()}
    return type(target)(_rows(part, rows) for part in target) if tensors_in(target) else target
