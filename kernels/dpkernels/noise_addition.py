"""Noise for clipped sums, as optax gradient transformations."""

import secrets
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpkernels import _validate
from dpkernels.gaussian import standard_normal


class NoiseState(NamedTuple):
    """Where a noise stream stands: `step` draws of `key` are used up.

    Attributes:
        key: Threefry key of the whole stream.
        step: Scalar uint32, the number of updates so far.
    """

    key: jax.Array
    step: jax.Array


def gaussian_privatizer(
    *,
    stddev: float | jax.Array,
    prng_key: jax.Array | int | None = None,
    dtype: Any = None,
) -> optax.GradientTransformation:
    """Adds i.i.d. Gaussian noise to every coordinate of a clipped sum, afresh at each update.

    Args:
        stddev: Standard deviation of the noise, in the units of the sum: the noise multiplier
            times `clipped_grad(...).sensitivity()`.
        prng_key: Seed or Threefry key of the stream. By default 64 bits of the operating system.
        dtype: Noise is drawn in and added as this type, float32 or float64. By default float64
            for float64 leaves, float32 for all others.

    Returns:
        A transformation whose `update` takes a pytree of sums and a `NoiseState`, and returns the
        noised pytree, each leaf in its own dtype, and the next state.

    Raises:
        ValueError: If `stddev` is negative, infinite or NaN.
        TypeError: If `dtype` is not float32 or float64, or the key is not a Threefry key.
        NotImplementedError: From `update`, if a leaf is not of a floating-point type.

    Guarantees:
        Each coordinate receives an independent draw of N(0, stddev²).
        No draw is used twice: two updates, or two leaves of one update, never share one.
        The noise depends on the key, the step and the shapes alone, never on the sums.

    Source:
        Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1.

    Example:
        >>> noise = gaussian_privatizer(stddev=0.0, prng_key=0)
        >>> total = {"w": jnp.ones(2)}
        >>> noised, state = noise.update(total, noise.init(total))
        >>> noised["w"].tolist(), int(state.step)
        ([1.0, 1.0], 1)
    """
    if not isinstance(stddev, jax.core.Tracer):
        _validate.non_negative("stddev", _scalar(stddev), "Pass noise_multiplier * sensitivity.")
    if dtype is not None and jnp.dtype(dtype) not in (jnp.float32, jnp.float64):
        raise TypeError(
            f"`dtype` must be float32 or float64, got {jnp.dtype(dtype).name}. "
            "The noised sums keep their own type whatever is given here."
        )

    def init(params: optax.Params) -> NoiseState:
        del params
        return NoiseState(make_key(prng_key), jnp.zeros((), jnp.uint32))

    def update(
        updates: optax.Updates, state: NoiseState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, NoiseState]:
        del params
        leaves, structure = jax.tree.flatten(updates)
        key = jax.random.fold_in(state.key, state.step)
        noised = [
            _add_noise(leaf, jax.random.fold_in(key, index), stddev, dtype)
            for index, leaf in enumerate(leaves)
        ]
        step = state.step + jnp.ones((), jnp.uint32)
        return jax.tree.unflatten(structure, noised), NoiseState(state.key, step)

    return optax.GradientTransformation(init, update)


def make_key(seed: jax.Array | int | None) -> jax.Array:
    """Returns a Threefry key: the one given, one of an integer seed, or one of 64 random bits.

    Args:
        seed: A key, a non-negative integer below 2**64, or None for the operating system's bits.

    Raises:
        TypeError: If `seed` is none of these.
        ValueError: If an integer is negative or too large.
    """
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        return seed
    if isinstance(seed, jax.Array):
        return jax.random.wrap_key_data(seed, impl="threefry2x32")
    if seed is None:
        seed = secrets.randbits(64)
    hint = "Pass nothing to draw the seed from the operating system."
    seed = _validate.integer("seed", seed, hint, minimum=0)
    if seed >= 2**64:
        raise ValueError(f"`seed` must be below 2**64, got {seed}. {hint}")
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


def _scalar(value: float | jax.Array) -> Any:
    return value.item() if isinstance(value, (jax.Array, np.ndarray, np.generic)) else value


def _add_noise(leaf: jax.Array, key: jax.Array, stddev: float | jax.Array, dtype: Any) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise NotImplementedError(
            f"Sums must be of a floating-point type, got {leaf.dtype}. Integers, as `grid_scale` "
            "makes them, need discrete Gaussian noise, which is not supported yet."
        )
    wide = jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32
    kind = jnp.dtype(dtype or wide)
    noise = standard_normal(key, leaf.shape, kind) * jnp.asarray(stddev, kind)
    return (leaf.astype(kind) + noise).astype(leaf.dtype)
