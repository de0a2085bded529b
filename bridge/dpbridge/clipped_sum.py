"""One compiled program: per-example gradients of a torch model, clipped and summed in JAX."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from dpbridge._compat import matmul_precision
from dpbridge.example_loss import ExampleLoss
from dpbridge.exchange import finish, to_jax
from dpbridge.fast_first import FastFirst
from dpbridge.fingerprint import Fingerprint
from dpbridge.lasting import lasting_to_jax
from dpbridge.mechanism import Mechanism
from dpbridge.scaling import ScaledOptimizer
from dpbridge.streams import Stream
from dpbridge.trainable import check_parameters
from dpkernels.tapped.explain import Explanation
from dpkernels.tree_clipping import widest

Arrays = dict[str, jax.Array]
Tensors = Mapping[str, torch.Tensor]


class Result(NamedTuple):
    """What one run gives.

    Attributes:
        sums: The clipped sums, by parameter name. Private: not to be shown to torch.
        loss: Mean loss over the real examples.
        holds: For each of the program's messages whether all is well.
    """

    sums: Arrays
    loss: jax.Array
    holds: tuple[jax.Array, ...]


class ClippedSum:
    """The program of one kind of batch, compiled once for each padded size.

    The fast one of two, until a batch needs the other: see `FastFirst`.

    Args:
        loss: Of one example.
        model: The module.
        trainable: The parameters to differentiate, by name.
        mechanism: How gradients are clipped.
        scaling: How they are scaled before that, or None.

    Attributes:
        loss: Of one example.
        ready_sizes: See `FastFirst`.
        fingerprint: What the model was when it was last checked; keeps identities from reuse.

    Raises:
        NotImplementedError: If an op has no lowering rule; from the first call, if at all.
        ValueError: If a parameter was replaced in the model.
    """

    def __init__(
        self,
        loss: ExampleLoss,
        model: nn.Module,
        trainable: Tensors,
        mechanism: Mechanism,
        scaling: ScaledOptimizer | None = None,
    ) -> None:
        self.loss = loss
        check_parameters(model, trainable)
        self._frozen = {n: x for n, x in loss.tensors.items() if n not in trainable}
        self._run = self._make(mechanism, scaling)
        self.ready_sizes = self._run.ready_sizes
        self.fingerprint: Fingerprint | None = None

    @property
    def is_careful(self) -> bool:
        """See `FastFirst`."""
        return self._run.is_careful

    def __call__(
        self,
        trainable: Tensors,
        tensors: Sequence[torch.Tensor],
        is_padding_example: np.ndarray,
        *,
        streams: tuple[Stream, ...],
        l2_clip_norm: float,
        second_moments: Tensors | None = None,
        randomness: bool = True,
        kept: None = None,
    ) -> Result:
        """Runs on a batch that is padded already.

        Args:
            trainable: The parameters to differentiate, by name.
            tensors: Leaves of the batch, `(padded size, ...)`.
            is_padding_example: `(padded size,)` bools.
            streams: Random numbers for dropout, of this physical batch.
            l2_clip_norm: Bound on each example's gradient, where the mechanism takes one.
            second_moments: By which gradients are scaled, by name, if there is a scaling.
            randomness: False makes dropout the identity, and fixes what is drawn.
            kept: Nothing is, here.

        Raises:
            IndexError: If a label or token of the batch is out of range.
        """
        del kept
        with matmul_precision():
            return Result(
                *self._run(
                    lasting_to_jax(trainable),
                    lasting_to_jax(self._frozen),
                    to_jax(tuple(tensors)),
                    is_padding_example,
                    streams,
                    np.float64(l2_clip_norm),
                    to_jax(dict(second_moments or {})),
                    np.bool_(randomness),
                )
            )

    def explain(
        self,
        trainable: Tensors,
        tensors: Sequence[torch.Tensor],
        *,
        streams: tuple[Stream, ...],
        second_moments: Tensors | None = None,
    ) -> Explanation:
        """Says how norm and clipped sum of every parameter are found, and what that costs.

        Args:
            trainable: The parameters to differentiate, by name.
            tensors: Leaves of the batch, `(size, ...)`.
            streams: As in a call.
            second_moments: As in a call.

        Raises:
            NotImplementedError: If the gradient of every example is formed.
        """
        rows = to_jax(tuple(tensors))
        clipped_grad, wide = self._prepare(
            lasting_to_jax(trainable),
            lasting_to_jax(self._frozen),
            rows,
            1.0,
            to_jax(dict(second_moments or {})),
            np.bool_(False),
        )
        return clipped_grad.explain(wide, keys_of(streams), rows)

    def _make(self, mechanism: Mechanism, scaling: ScaledOptimizer | None) -> FastFirst:
        loss = self.loss

        def prepare(
            clip: Callable[..., Any],
            trainable: Arrays,
            frozen: Arrays,
            rows: tuple[jax.Array, ...],
            l2_clip_norm: Any,
            second_moments: Arrays,
            randomness: Any,
        ) -> tuple[Any, Arrays]:
            """Returns the clipped sum, of parameters and rows, and its parameters."""

            def loss_of_example(
                wide: Arrays, keys: tuple[jax.Array, ...], row: tuple[jax.Array, ...]
            ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
                own = {name: wide[name].astype(trainable[name].dtype) for name in wide}
                # A plan may cut off the example's axis of 1, which the program has.
                shapes = [(1, *array.shape[1:]) for array in rows]
                row = tuple(x.reshape(shape) for x, shape in zip(row, shapes, strict=True))
                value, holds = loss({**frozen, **own}, keys, randomness, *row)
                # One scalar each: `clipped_grad` drops an axis of 1 from what has one.
                return value, tuple(holds[i] for i in range(holds.shape[0]))

            transform = None if scaling is None else scaling.transform(second_moments)
            # Half-precision parameters are differentiated through a cast, so that gradients are
            # clipped and summed in float32.
            wide = {name: array.astype(widest([array])) for name, array in trainable.items()}
            return clip(loss_of_example, l2_clip_norm, transform), wide

        def run(
            is_fast: bool,
            trainable: Arrays,
            frozen: Arrays,
            rows: tuple[jax.Array, ...],
            is_padding_example: jax.Array,
            streams: tuple[Stream, ...],
            l2_clip_norm: jax.Array,
            second_moments: Arrays,
            randomness: jax.Array,
        ) -> Any:
            clip = mechanism.fast_clipped_grad if is_fast else mechanism.clipped_grad
            clipped_grad, wide = prepare(
                clip, trainable, frozen, rows, l2_clip_norm, second_moments, randomness
            )
            found = clipped_grad(
                wide, keys_of(streams), rows, is_padding_example=is_padding_example
            )
            (sums, aux), needs_care = found if is_fast else (found, None)
            is_real = ~is_padding_example
            losses = jnp.where(is_real, aux.values, jnp.zeros((), aux.values.dtype))
            count = jnp.sum(is_real).astype(losses.dtype)
            holds = tuple(jnp.all(jnp.where(is_real, h, True)) for h in aux.aux)
            result = sums, jnp.sum(losses) / count, holds
            return (result, needs_care) if is_fast else result

        def check(result: tuple[Any, Any, tuple[jax.Array, ...]]) -> None:
            check_messages(loss.messages, result[2])

        self._prepare = partial(prepare, mechanism.clipped_grad)
        # Gradients that are scaled are formed each by itself: there is one way alone.
        has_fast = scaling is None and mechanism.fast_clipped_grad(lambda *_: None, 1.0) is not None
        fast = jax.jit(partial(run, True)) if has_fast else None
        return FastFirst(jax.jit(partial(run, False)), fast, check)


def keys_of(streams: tuple[Stream, ...]) -> tuple[jax.Array, ...]:
    """Returns the key of each stream. Call it under jit."""
    return tuple(stream.key() for stream in streams)


def check_messages(messages: Sequence[str], holds: Sequence[jax.Array]) -> None:
    """Raises IndexError with the messages of what does not hold."""
    broken = [text for text, holds in zip(messages, holds, strict=True) if not bool(holds)]
    if broken:
        raise IndexError("; ".join(broken))


def settle(result: Result) -> torch.Tensor:
    """Returns the loss as a tensor, once torch may write to what the run has read."""
    if next(iter(result.loss.devices())).platform == "cpu":
        jax.block_until_ready(result)
    loss: torch.Tensor = finish(result.loss)
    return loss
