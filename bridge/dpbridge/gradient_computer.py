"""`DpsgdGradientComputer`: clipped gradients and noise as two calls, for loops of one's own."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from torch import nn

from dpbridge._compat import x64
from dpbridge.batches import take_apart
from dpbridge.exchange import finish
from dpbridge.mechanism import GaussianMechanism
from dpbridge.private_gradient import PrivateGradient
from dpbridge.streams import Stream, noise_stream
from dpbridge.trainable import check_model, check_seed, device_of, names_of
from dpkernels import _validate, gaussian_privatizer
from dpkernels.noise_addition import NoiseState

Arrays = dict[str, jax.Array]


@dataclass(frozen=True, eq=False)
class ClippedGradients:
    """Clipped gradients added up, kept in JAX. Private: `add_noise_to_grads` makes them not.

    Those of several batches of one step add up with `+`.

    Attributes:
        total: By parameter name.
        size: Of how many examples it is the sum.
    """

    total: Arrays
    size: int

    @property
    def mean(self) -> Arrays:
        """The mean over the batch, by parameter name; zeros for an empty one."""
        with x64():
            size = max(self.size, 1)
            return {name: x / np.asarray(size, x.dtype) for name, x in self.total.items()}

    def __add__(self, other: "ClippedGradients") -> "ClippedGradients":
        if self.total.keys() != other.total.keys():
            raise ValueError(
                "ClippedGradients must be of the same parameters to be added, got "
                f"{', '.join(sorted(self.total))} and {', '.join(sorted(other.total))}. "
                "Do not freeze or unfreeze parameters within a step."
            )
        with x64():
            total = {name: x + other.total[name] for name, x in self.total.items()}
        return ClippedGradients(total, self.size + other.size)


class NoisedGradients(NamedTuple):
    """What `add_noise_to_grads` returns.

    Attributes:
        grads: By parameter name, a tensor of the parameter's shape, dtype and device.
        std: Standard deviation of the noise on each coordinate.
        noise_state: How many draws of noise there were: to be passed to the next call.
    """

    grads: dict[str, torch.Tensor]
    std: float
    noise_state: int


class DpsgdGradientComputer:
    """Clips gradients to their mean, and adds noise to a mean over a total batch.

    The small interface of JAX Privacy 1.0, for loops that `DPOptimizer` does not fit. It clips
    and noises, and no more: what batches are drawn and what they spend is the caller's business.
    `DPOptimizer` takes care of both.

    Args:
        model: The module.
        loss_fn: As in `DPOptimizer`.
        clipping_norm: Bound on the L2 norm of each example's gradient.
        noise_multiplier: Standard deviation of the noise over `clipping_norm`; 0 is not private.
        rescale_to_unit_norm: Divides clipped gradients by `clipping_norm`.
        microbatch_size: How many examples JAX works on at once. Changes no result.
        seed: Of noise and dropout, below 2**64. By default 64 bits of the operating system.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range.
        NotImplementedError: If the model has batch normalisation.

    Guarantees:
        One example moves the sum of the clipped gradients by at most `clipping_norm` in L2 norm,
        or 1 if rescaled.
        What is noised is that sum over `total_batch_size`, whatever the number of examples drawn.
        The noise on each coordinate is N(0, std²), std = noise_multiplier · clipping_norm /
        total_batch_size, or noise_multiplier / total_batch_size if rescaled.
        Each `noise_state` has noise of its own.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> computer = DpsgdGradientComputer(
        ...     model, nn.MSELoss(), clipping_norm=0.1, noise_multiplier=3.0)
        >>> state = computer.init_noise_state()
        >>> loss, grads = computer.loss_and_clipped_gradients(torch.ones(4, 2), torch.zeros(4, 1))
        >>> noised = computer.add_noise_to_grads(grads, total_batch_size=4, noise_state=state)
        >>> round(noised.std, 4), noised.noise_state
        (0.075, 1)
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any] | None = None,
        *,
        clipping_norm: float,
        noise_multiplier: float,
        rescale_to_unit_norm: bool = False,
        microbatch_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        check_model(model)
        hint = "Pass the bound on one example's gradient norm."
        self.clipping_norm = _validate.positive("clipping_norm", clipping_norm, hint)
        hint = "Calibrate it with dpbridge.accounting."
        noise_multiplier = _validate.non_negative("noise_multiplier", noise_multiplier, hint)
        self.noise_multiplier = noise_multiplier
        self.rescale_to_unit_norm = bool(rescale_to_unit_norm)
        seed = secrets.randbits(64) if seed is None else check_seed(seed)
        mechanism = GaussianMechanism(self.clipping_norm, noise_multiplier, 1.0, microbatch_size)
        self._gradient = PrivateGradient(model, loss_fn, mechanism, seed, None, True)
        self._model = model
        self._drawn = 0

    def loss_and_clipped_gradients(
        self, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, ClippedGradients]:
        """Returns the mean loss of a batch and its clipped gradients.

        Args:
            *args: As in `DPOptimizer.backward`.
            **kwargs: Likewise.

        Raises:
            TypeError, ValueError, IndexError, RuntimeError: As in `DPOptimizer.backward`.
        """
        batch = take_apart(args, kwargs, device_of(self._model))
        trainable = self._trainable()
        self._gradient.steps = self._drawn  # Dropout of its own in every batch.
        loss = self._gradient.add(self._gradient.part_of(batch), trainable)
        with x64():
            sums = self._gradient.take_sums(trainable)
            unit = self.clipping_norm if self.rescale_to_unit_norm else 1.0
            total = {name: x / np.asarray(unit, x.dtype) for name, x in sums.items()}
        self._drawn += 1
        return loss, ClippedGradients(total, batch.size)

    def init_noise_state(self) -> int:
        """Returns the state before the first draw of noise."""
        return 0

    def add_noise_to_grads(
        self, grads: ClippedGradients, *, total_batch_size: int, noise_state: int
    ) -> NoisedGradients:
        """Returns the sum of the gradients over the total batch size, with noise on it.

        Args:
            grads: What `loss_and_clipped_gradients` returned, of all batches of the step.
            total_batch_size: How many examples a step has, in the mean if they are drawn at
                random: a public number, never the number drawn.
            noise_state: What the call before returned, or `init_noise_state`.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If one is out of range.
        """
        if not isinstance(grads, ClippedGradients):
            raise TypeError(
                f"`grads` must be ClippedGradients, got {type(grads).__name__}. Pass what "
                "`loss_and_clipped_gradients` returned."
            )
        hint = "Pass the examples of a step."
        total = _validate.integer("total_batch_size", total_batch_size, hint, minimum=1)
        hint = "Pass what the call before returned."
        step = _validate.integer("noise_state", noise_state, hint, minimum=0)
        bound = 1.0 if self.rescale_to_unit_norm else self.clipping_norm
        std = self.noise_multiplier * bound / total
        trainable = self._trainable()
        with x64():
            stream = noise_stream(self._gradient.seed)
            noised = _noised(
                grads.total, stream, np.uint32(step), np.float64(std), np.float64(total)
            )
            tensors = {name: finish(noised[name]).to(trainable[name].dtype) for name in grads.total}
        return NoisedGradients(tensors, std, step + 1)

    def _trainable(self) -> dict[str, nn.Parameter]:
        named = {name: p for p, name in names_of(self._model).items() if p.requires_grad}
        return dict(sorted(named.items()))


@jax.jit
def _noised(
    sums: Arrays, stream: Stream, step: jax.Array, std: jax.Array, total: jax.Array
) -> Arrays:
    scaled = {name: x / total.astype(x.dtype) for name, x in sums.items()}
    noised, _ = gaussian_privatizer(stddev=std).update(scaled, NoiseState(stream.key(), step))
    return dict(noised)
