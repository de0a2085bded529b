"""What a model of the registry is: a loss of one example and what it is called with."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BATCH = 5


@dataclass(frozen=True)
class Model:
    """A loss and what it is called with.

    Attributes:
        loss: Called with one row of every batched argument and with the others whole.
        args: Parameters, batch and the rest, arrays of NumPy or keys of JAX.
        argnums: The arguments that are differentiated.
        batch_argnums: The arguments that have a leading batch axis.
        options: What else `clipped_grad` must know to call `loss`.
        rtol: How close it can come to float64: 1e-5, and more where it computes in half precision.
        spreads: Whether the gradients of its examples have norms of different size.
        slow: Whether a near relative of it is enough for a quick look.
    """

    name: str
    loss: Callable[..., Any]
    args: tuple[Any, ...]
    argnums: int | tuple[int, ...] = 0
    batch_argnums: tuple[int, ...] = (1,)
    options: tuple[tuple[str, Any], ...] = ()
    rtol: float = 1e-5
    spreads: bool = True
    slow: bool = False

    def __repr__(self):
        return self.name

    @property
    def clipped_grad_options(self):
        call = {"argnums": self.argnums, "batch_argnums": self.batch_argnums}
        return call | {"keep_batch_dim": False} | dict(self.options)


class Family(dict):
    """Models by name; `family(...)` decorates the loss of the next."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def __call__(self, params, *batch, extra=(), rtol=1e-5, spreads=True, slow=False, **how):
        """Registers a loss under its function's name.

        Args:
            params: A pytree, where a tuple of integers stands for an array of that shape.
            *batch: Shapes of one example, as `params`, or whole arrays.
            extra: Arguments after the batch, without a batch axis.
            rtol: See `Model`.
            spreads: See `Model`.
            slow: See `Model`.
            **how: `argnums`, `batch_argnums`, and what else `clipped_grad` is called with.
        """

        def register(loss):
            name = f"{self.name}-{loss.__name__}"
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            batched = tuple(_fill(part, rng, (BATCH,), 1.0) for part in batch)
            args = (_fill(params, rng, (), 0.6), *batched, *extra)
            argnums = how.pop("argnums", 0)
            batch_argnums = how.pop("batch_argnums", tuple(range(1, 1 + len(batch))))
            options = tuple(how.items())
            if name in self:
                raise ValueError(f"{name} is registered twice")
            self[name] = Model(
                name, loss, args, argnums, batch_argnums, options, rtol, spreads, slow
            )
            return loss

        return register


def integers(low, high, *shape):
    """Draws a batch of integers in [low, high)."""
    rng = np.random.default_rng(high)
    return rng.integers(low, high, (BATCH, *shape), dtype=np.int32)


def score(y):
    """A scalar whose derivative differs from coordinate to coordinate and grows with `y`."""
    return jnp.mean(jnp.sin(y) + jnp.square(y))


def normalize(x, axes, eps=1e-3):
    """Mean 0 and variance 1 over `axes`."""
    centred = x - x.mean(axes, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + eps)


def _fill(spec, rng, lead, scale):
    def draw(leaf):
        if not isinstance(leaf, tuple):
            return leaf
        return scale * rng.normal(size=lead + leaf).astype(np.float32)

    # Keep NumPy's scalars out: `scale * array` of shape () would be one.
    return jax.tree.map(lambda leaf: np.asarray(draw(leaf)), spec, is_leaf=_is_shape)


def _is_shape(spec):
    return isinstance(spec, tuple) and all(isinstance(size, int) for size in spec)
