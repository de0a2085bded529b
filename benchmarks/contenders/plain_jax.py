"""Training without privacy, as JAX does it: the gradient of the mean loss of the lowered model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contenders.base import Contender
from benchmarks.task import Gradients, Task
from dpbridge import to_jax
from dpbridge._compat import matmul_precision, x64
from dpbridge.lowering import lower

Arrays = dict[str, jax.Array]


class Lowered:
    """The program that dpbridge makes of a model, as a plain JAX loss of one example.

    Attributes:
        trainable: Parameters to differentiate.
        frozen: All else that the program reads.
        rows: The batch.
    """

    def __init__(self, task: Task) -> None:
        # The tensors are kept: JAX reads their memory.
        self._model = task.model()
        example = task.inputs[:1], task.targets[:1]
        self._program = lower(self._model, task.row.make_loss(), example, {})
        parameters = dict(self._model.named_parameters())
        tensors = {
            name: self._program.constants.get(name, parameters.get(name))
            for name in self._program.inputs
            if name is not None
        }
        is_trainable = {name: tensor.requires_grad for name, tensor in tensors.items()}
        arrays = to_jax(tensors)
        self.trainable: Arrays = {k: v for k, v in arrays.items() if is_trainable[k]}
        self.frozen: Arrays = {k: v for k, v in arrays.items() if not is_trainable[k]}
        self.rows: tuple[jax.Array, ...] = to_jax((task.inputs, task.targets))

    def loss(self, trainable: Arrays, frozen: Arrays, row: tuple[jax.Array, ...]) -> jax.Array:
        """Returns the loss of one example, whose arrays have a leading axis of 1."""
        key = jax.random.key(0)
        (loss,), _ = self._program({**frozen, **trainable}, key, np.bool_(True), *row)
        return loss


class JaxContender(Contender):
    """A function of `Lowered`, compiled ahead of time."""

    def __init__(self, task: Task) -> None:
        with x64(), matmul_precision():
            lowered = Lowered(task)
            self._args = lowered.trainable, lowered.frozen, lowered.rows
            self._lowered = lowered
            self._compiled = self._compile(task)
        self._found: Arrays = {}

    def _compile(self, task: Task) -> Any:
        return jax.jit(self._function(task)).lower(*self._args).compile()

    def _function(self, task: Task) -> Any:
        raise NotImplementedError

    def __call__(self) -> None:
        self._found = jax.block_until_ready(self._compiled(*self._args))

    def gradients(self) -> Gradients:
        return {name: np.asarray(array) for name, array in self._found.items()}

    def compiled(self) -> Any:
        return self._compiled

    def clear(self) -> None:
        self._found = {}


class PlainJax(JaxContender):
    """`jax.grad` of the mean loss."""

    title = "JAX, not private"
    is_private = False

    def _function(self, task: Task) -> Any:
        def mean_loss(trainable: Arrays, frozen: Arrays, rows: tuple[jax.Array, ...]) -> jax.Array:
            def of_one(row: tuple[jax.Array, ...]) -> jax.Array:
                return self._lowered.loss(trainable, frozen, tuple(x[None] for x in row))

            return jnp.mean(jax.vmap(of_one)(rows))

        return jax.grad(mean_loss)
