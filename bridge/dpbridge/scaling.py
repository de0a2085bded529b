"""Clipping and noising in the geometry of an adaptive optimizer, with torch's own optimizers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
import torch
from torch import nn
from torch.optim import Optimizer

from dpkernels import optimizers

Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class ScaledOptimizer:
    """An optimizer whose second moments say how gradients are scaled before they are clipped.

    Attributes:
        base_optimizer: The torch optimizer.
        eps: Added to the root of the second moment.
        eps_root: Added to the second moment.
    """

    base_optimizer: Optimizer
    eps: float
    eps_root: float

    def second_moments(self, trainable: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Returns the second moment of each parameter after the last step; zeros before it."""
        of_group = {p: group for group in self.base_optimizer.param_groups for p in group["params"]}
        return {
            name: _second_moment(self.base_optimizer, of_group[p], p)
            for name, p in trainable.items()
        }

    def transform(self, moments: Arrays) -> optimizers.PreClippingTransform:
        """Returns what multiplies a gradient by 1 / (sqrt(v + eps_root) + eps), or back."""
        augmented = optimizers.scale_then_privatize(
            optax.identity(),
            self.eps,
            self.eps_root,
            extract_preconditioner_from_state_fn=lambda state: state,
        )
        return augmented.pre_clipping_transform(moments)


def scale_then_privatize(
    base_optimizer: Optimizer, *, eps: float = 1e-8, eps_root: float = 0.0
) -> ScaledOptimizer:
    """Makes a `DPOptimizer` clip and noise gradients in the geometry of an adaptive optimizer.

    With v the second moment that the optimizer held after the step before, each gradient is
    multiplied by 1 / (sqrt(v + eps_root) + eps), coordinate by coordinate, then clipped, summed
    and noised; the noised sum is divided by it again, and the optimizer steps with that. See
    `dpkernels.optimizers.scale_then_privatize`, also for the choice of `eps`.

    This forms the gradient of every example, in microbatches: it costs more than clipping alone.

    Args:
        base_optimizer: A torch optimizer of class Adam (`amsgrad` too), AdamW, NAdam, RAdam,
            RMSprop or Adagrad.
        eps: Positive, or 0 if `eps_root` is positive.
        eps_root: Non-negative.

    Returns:
        What to pass to `DPOptimizer`, or to `train`, in place of the optimizer.

    Raises:
        TypeError: If the optimizer keeps no second moment that is known here.
        ValueError: If `eps` or `eps_root` is out of range.
        NotImplementedError: If the optimizer is a centered RMSprop.

    Guarantees:
        Gradients are scaled by what was released before alone, never by the batch.

    Source:
        Ganesh, McMahan and Thakurta 2025, arXiv 2507.01129, algorithm 8.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> base = torch.optim.Adam(model.parameters(), lr=1e-3)
        >>> scaled = scale_then_privatize(base, eps=1e-3)
        >>> moments = scaled.second_moments(dict(model.named_parameters()))
        >>> moments["weight"].tolist()
        [[0.0, 0.0]]
    """
    if _reader(base_optimizer) is None:
        known = ", ".join(kind.__name__ for kind in _READERS)
        raise TypeError(
            f"`base_optimizer` must be one of {known}, got {type(base_optimizer).__name__}. Others "
            "keep no second moment that is known here."
        )
    if any(group.get("centered") for group in base_optimizer.param_groups):
        raise NotImplementedError(
            "`base_optimizer` must not be centered, got RMSprop with centered=True, which divides "
            "by another quantity than a second moment. Leave it out."
        )
    scaled = ScaledOptimizer(base_optimizer, eps, eps_root)
    scaled.transform({})  # Checks eps and eps_root.
    return scaled


def _adams(state: Mapping[str, Any], group: Mapping[str, Any]) -> Any:
    return state.get("max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq")


_READERS: dict[type[Optimizer], Callable[[Mapping[str, Any], Mapping[str, Any]], Any]] = {
    torch.optim.Adam: _adams,
    torch.optim.AdamW: _adams,
    torch.optim.NAdam: _adams,
    torch.optim.RAdam: _adams,
    torch.optim.RMSprop: lambda state, group: state.get("square_avg"),
    torch.optim.Adagrad: lambda state, group: state.get("sum"),
}


def _reader(optimizer: Any) -> Callable[[Mapping[str, Any], Mapping[str, Any]], Any] | None:
    found = (read for kind, read in _READERS.items() if isinstance(optimizer, kind))
    return next(found, None)


def _second_moment(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: nn.Parameter
) -> torch.Tensor:
    read = _reader(optimizer)
    # Not optimizer.state[parameter]: a defaultdict would make an entry, and Adam take it for its.
    state = optimizer.state.get(parameter, {})
    moment = read(state, group) if read is not None else None
    return torch.zeros_like(parameter) if moment is None else moment.detach()
