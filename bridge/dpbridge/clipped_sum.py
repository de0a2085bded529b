"""One compiled program: per-example gradients of a torch model, clipped and summed in JAX."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

import dpkernels
from dpbridge._compat import matmul_precision
from dpbridge.batches import Batch
from dpbridge.exchange import finish, to_jax
from dpbridge.fingerprint import Fingerprint
from dpbridge.lowering import lower
from dpbridge.streams import Stream
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
    """The lowered program of one kind of batch, compiled once for each padded size.

    Args:
        model: The module.
        loss_fn: The loss, or None if the model returns it.
        batch: A batch of the kind that it is for.
        trainable: The parameters to differentiate, by name.
        microbatch_size: How many examples JAX holds at once.

    Attributes:
        ready_sizes: Padded sizes at which it has run and, unless that is off, was checked.
        fingerprint: What the model was when it was last checked; keeps identities from reuse.

    Raises:
        NotImplementedError: If an op has no lowering rule; from the first call, if at all.
        ValueError: If the loss is not a scalar, or a parameter was replaced in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any] | None,
        batch: Batch,
        trainable: Tensors,
        microbatch_size: int | None,
    ) -> None:
        self._program = lower(model, loss_fn, *batch.example(0))
        parameters = dict(model.named_parameters())
        for name, parameter in trainable.items():
            if parameters.get(name) is not parameter:
                raise ValueError(
                    f"`{name}` must be the parameter that the optimizer holds, got another one in "
                    "the model. Make a new optimizer after replacing parameters."
                )
        self._frozen = {
            name: self._program.constants.get(name, parameters.get(name))
            for name in self._program.inputs
            if name is not None and name not in trainable
        }
        self._run = jax.jit(self._make(microbatch_size))
        self.ready_sizes: set[int] = set()
        self.fingerprint: Fingerprint | None = None

    def __call__(
        self,
        trainable: Tensors,
        tensors: Sequence[torch.Tensor],
        is_padding_example: np.ndarray,
        *,
        stream: Stream,
        l2_clip_norm: float,
        randomness: bool = True,
    ) -> Result:
        """Runs on a batch that is padded already.

        Args:
            trainable: The parameters to differentiate, by name.
            tensors: Leaves of the batch, `(padded size, ...)`.
            is_padding_example: `(padded size,)` bools.
            stream: Random numbers for dropout, of this physical batch.
            l2_clip_norm: Bound on each example's gradient.
            randomness: False makes dropout the identity.

        Raises:
            IndexError: If a label or token of the batch is out of range.
        """
        with matmul_precision():
            result = Result(
                *self._run(
                    to_jax(dict(trainable)),
                    to_jax(self._frozen),
                    to_jax(tuple(tensors)),
                    is_padding_example,
                    stream,
                    np.float64(l2_clip_norm),
                    np.bool_(randomness),
                )
            )
        messages = self._program.messages
        broken = [
            text for text, holds in zip(messages, result.holds, strict=True) if not bool(holds)
        ]
        if broken:
            raise IndexError("; ".join(broken))
        return result

    def _make(self, microbatch_size: int | None) -> Callable[..., Any]:
        program = self._program

        def run(
            trainable: Arrays,
            frozen: Arrays,
            rows: tuple[jax.Array, ...],
            is_padding_example: jax.Array,
            stream: Stream,
            l2_clip_norm: jax.Array,
            randomness: jax.Array,
        ) -> Any:
            def loss_of_example(
                wide: Arrays, key: jax.Array, row: tuple[jax.Array, ...]
            ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
                own = {name: wide[name].astype(trainable[name].dtype) for name in wide}
                loss, holds = program({**frozen, **own}, key, randomness, *row)
                # One scalar each: `clipped_grad` drops an axis of 1 from what has one.
                return loss, tuple(holds[i] for i in range(holds.shape[0]))

            clipped_grad = _clipped_grad(loss_of_example, l2_clip_norm, microbatch_size)
            # Half-precision parameters are differentiated through a cast, so that gradients are
            # clipped and summed in float32.
            wide = {name: array.astype(widest([array])) for name, array in trainable.items()}
            key = stream.key()
            sums, aux = clipped_grad(wide, key, rows, is_padding_example=is_padding_example)
            is_real = ~is_padding_example
            losses = jnp.where(is_real, aux.values, jnp.zeros((), aux.values.dtype))
            count = jnp.sum(is_real).astype(losses.dtype)
            holds = tuple(jnp.all(jnp.where(is_real, h, True)) for h in aux.aux)
            return sums, jnp.sum(losses) / count, holds

        return run


def sensitivity(l2_clip_norm: float) -> float:
    """Returns by how much, in L2 norm, the sums move when an example is added or removed."""
    function = _clipped_grad(lambda *_: None, l2_clip_norm, None)
    return function.sensitivity(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)


def _clipped_grad(
    loss_of_example: Callable[..., Any], l2_clip_norm: Any, microbatch_size: int | None
) -> dpkernels.BoundedSensitivityCallable:
    return dpkernels.clipped_grad(
        loss_of_example,
        has_aux=True,
        l2_clip_norm=l2_clip_norm,
        batch_argnums=2,
        prng_argnum=1,
        return_values=True,
        microbatch_size=microbatch_size,
    )


def settle(result: Result) -> torch.Tensor:
    """Returns the loss as a tensor, once torch may write to what the run has read."""
    if next(iter(result.loss.devices())).platform == "cpu":
        jax.block_until_ready(result)
    loss: torch.Tensor = finish(result.loss)
    return loss
