"""Noise for clipped sums, as optax gradient transformations: independent, or correlated in time."""

import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpkernels import _validate
from dpkernels.gaussian import standard_normal
from dpkernels.matrix_factorization.streaming_matrix import StreamingMatrix, constant, num_rows
from dpkernels.tree_clipping import widest

PyTree = Any


class NoiseState(NamedTuple):
    """Where a noise stream stands: `step` draws of `key` are used up.

    Attributes:
        key: Threefry key of the whole stream.
        step: Scalar uint32, the number of updates so far.
    """

    key: jax.Array
    step: jax.Array


class CorrelatedNoiseState(NamedTuple):
    """Where a stream of correlated noise stands, and what it remembers. Private, as all of it is.

    Attributes:
        key: Threefry key of the whole stream.
        step: Scalar uint32, the number of updates so far.
        buffers: The state of the noising matrix, a pytree of arrays: for a banded strategy the
            noise of the last updates, in float32 or float64.
    """

    key: jax.Array
    step: jax.Array
    buffers: PyTree


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
    _check_noise(stddev, dtype)

    def init(params: optax.Params) -> NoiseState:
        del params
        return NoiseState(make_key(prng_key), jnp.zeros((), jnp.uint32))

    def update(
        updates: optax.Updates, state: NoiseState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, NoiseState]:
        del params
        leaves, structure = jax.tree.flatten(updates)
        noise = _draw(state.key, state.step, _noise_like(leaves, dtype))
        noised = _add_noise(leaves, noise, stddev)
        return jax.tree.unflatten(structure, noised), NoiseState(state.key, _next(state.step))

    return optax.GradientTransformation(init, update)


def matrix_factorization_privatizer(
    noising_matrix: StreamingMatrix | jax.Array | np.ndarray,
    *,
    stddev: float | jax.Array,
    prng_key: jax.Array | int | None = None,
    dtype: Any = None,
) -> optax.GradientTransformation:
    """Adds noise that is correlated in time: at update t, row t of stddev · C⁻¹ Z.

    Z is i.i.d. Gaussian noise of one row an update, and C⁻¹ the noising matrix: the inverse of the
    strategy C. Noise that an update adds is partly taken away by later ones, so that sums of many
    updates have less of it.

    Args:
        noising_matrix: C⁻¹. A `StreamingMatrix`, whose state is held between updates, or a dense
            matrix `(updates, draws)`, which holds nothing: draws are made anew for each row, which
            costs as many as there are from its first non-zero entry to its last.
        stddev: Standard deviation of Z, in the units of the sum: the noise multiplier times
            `clipped_grad(...).sensitivity()` times the sensitivity of C, which is the largest norm
            of its columns where an example takes part once.
        prng_key: As in `gaussian_privatizer`.
        dtype: As in `gaussian_privatizer`; the matrix is multiplied in this type too.

    Returns:
        A transformation as `gaussian_privatizer` returns. `init` takes the sums or their
        shapes. The state is a `CorrelatedNoiseState`, for a dense matrix a `NoiseState`.

    Raises:
        ValueError: If `stddev` is negative, infinite or NaN, or a dense matrix does not have two
            axes, has an entry that is not finite, or a row without noise.
        TypeError: If the matrix is of another type; further as in `gaussian_privatizer`.
        IndexError: From `update`, past the last row of the matrix.
        NotImplementedError: From `update`, if a leaf is not of a floating-point type.

    Guarantees:
        Update t adds row t of stddev · C⁻¹ Z, and the rows of Z are independent draws of
        N(0, stddev²): no two updates, and no two leaves, share one.
        Past the last row no noise is repeated or left out: `update` raises IndexError, and where
        the step is traced, as under `jax.jit`, all that it returns is NaN.
        The noise depends on the key, the step and the shapes alone, never on the sums.
        From a saved state the very same noise goes on.

    Source:
        Denisov et al. 2022, arXiv 2202.08312; streaming of banded strategies: McKenna 2024,
        arXiv 2405.15913.

    Example:
        >>> from dpkernels.matrix_factorization import toeplitz
        >>> inverse = toeplitz.inverse_as_streaming_matrix([1.0, 0.5])
        >>> noise = matrix_factorization_privatizer(inverse, stddev=1.0, prng_key=0)
        >>> total = {"w": jnp.zeros(2)}
        >>> first, state = noise.update(total, noise.init(total))
        >>> second, state = noise.update(total, state)
        >>> int(state.step)
        2
    """
    _check_noise(stddev, dtype)
    rows = num_rows(noising_matrix)
    if isinstance(noising_matrix, StreamingMatrix):
        return _streaming_privatizer(noising_matrix, stddev, prng_key, dtype)
    matrix = _check_dense(noising_matrix)
    row_of_noise = _make_row_of_noise(matrix)

    def init(params: optax.Params) -> NoiseState:
        del params
        return NoiseState(make_key(prng_key), jnp.zeros((), jnp.uint32))

    def update(
        updates: optax.Updates, state: NoiseState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, NoiseState]:
        del params
        within = _within(state.step, rows)
        leaves, structure = jax.tree.flatten(updates)
        zeros = [jnp.zeros(like.shape, like.dtype) for like in _noise_like(leaves, dtype)]
        noised = _add_noise(leaves, row_of_noise(state.key, state.step, zeros), stddev, within)
        return jax.tree.unflatten(structure, noised), NoiseState(state.key, _next(state.step))

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


def _check_noise(stddev: float | jax.Array, dtype: Any) -> None:
    if not isinstance(stddev, jax.core.Tracer):
        _validate.non_negative("stddev", _scalar(stddev), "Pass noise_multiplier * sensitivity.")
    if dtype is not None and jnp.dtype(dtype) not in (jnp.float32, jnp.float64):
        raise TypeError(
            f"`dtype` must be float32 or float64, got {jnp.dtype(dtype).name}. "
            "The noised sums keep their own type whatever is given here."
        )


def _scalar(value: float | jax.Array) -> Any:
    return value.item() if isinstance(value, (jax.Array, np.ndarray, np.generic)) else value


def _streaming_privatizer(
    matrix: StreamingMatrix, stddev: float | jax.Array, prng_key: Any, dtype: Any
) -> optax.GradientTransformation:
    def init(params: optax.Params) -> CorrelatedNoiseState:
        leaves, structure = jax.tree.flatten(params)
        like = jax.tree.unflatten(structure, _noise_like(leaves, dtype))
        step = jnp.zeros((), jnp.uint32)
        return CorrelatedNoiseState(make_key(prng_key), step, matrix.init_multiply(like))

    def update(
        updates: optax.Updates, state: CorrelatedNoiseState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, CorrelatedNoiseState]:
        del params
        within = _within(state.step, matrix.num_rows)
        leaves, structure = jax.tree.flatten(updates)
        draws = _draw(state.key, state.step, _noise_like(leaves, dtype))
        row, buffers = matrix.multiply_next(jax.tree.unflatten(structure, draws), state.buffers)
        noised = _add_noise(leaves, jax.tree.leaves(row), stddev, within)
        following = CorrelatedNoiseState(state.key, _next(state.step), buffers)
        return jax.tree.unflatten(structure, noised), following

    return optax.GradientTransformation(init, update)


def _check_dense(matrix: jax.Array | np.ndarray) -> np.ndarray:
    dense = np.asarray(matrix, np.float64)
    with np.errstate(over="ignore"):
        drawn = dense.astype(np.float32)  # What is left of it in most noise.
    if not np.isfinite(drawn).all():
        raise ValueError(
            "`noising_matrix` must be finite in float32, got entries that are not. Look at how the "
            "strategy was inverted."
        )
    silent = np.flatnonzero(~drawn.any(axis=1))
    if silent.size:
        raise ValueError(
            f"`noising_matrix` must have no row of zeros, got one at {silent[0]}. The sum of that "
            "update would be released without noise."
        )
    return dense


def _make_row_of_noise(matrix: np.ndarray) -> Any:
    """Returns a function of key, step and zeros that returns the noise of that row of the matrix.

    Only the span between the first and the last non-zero entry of a row is gone through.
    """
    present = matrix != 0
    first = np.argmax(present, axis=1).astype(np.int32)
    last = (matrix.shape[1] - np.argmax(present[:, ::-1], axis=1)).astype(np.int32)

    @jax.jit
    def row_of_noise(key: jax.Array, step: jax.Array, zeros: list[jax.Array]) -> list[jax.Array]:
        row = constant(matrix)[step]

        def add_draw(index: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
            draws = _draw(key, index.astype(jnp.uint32), totals)
            factor = row[index]
            return [t + factor.astype(t.dtype) * d for t, d in zip(totals, draws, strict=True)]

        return jax.lax.fori_loop(jnp.asarray(first)[step], jnp.asarray(last)[step], add_draw, zeros)

    return row_of_noise


def _within(step: jax.Array, rows: int | None) -> jax.Array | None:
    """Returns None or 1 while there are rows; then NaN where `step` is traced, or IndexError."""
    if rows is None:
        return None
    if isinstance(step, jax.core.Tracer):
        return jnp.where(step < rows, jnp.float32(1), jnp.float32(jnp.nan))
    if int(step) >= rows:
        raise IndexError(
            f"`noising_matrix` must have a row for every update, got {rows} rows and "
            f"{int(step)} updates before this one. Make it for more, or stop here."
        )
    return None


def _next(step: jax.Array) -> jax.Array:
    return step + jnp.ones((), jnp.uint32)


def _noise_like(leaves: Sequence[Any], dtype: Any) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes and types in which noise for these sums is drawn and multiplied."""
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise NotImplementedError(
                f"Sums must be of a floating-point type, got {leaf.dtype}. Integers, as "
                "`grid_scale` makes them, need discrete Gaussian noise, which is not supported yet."
            )
    return [jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype or widest([leaf]))) for leaf in leaves]


def _draw(key: jax.Array, step: jax.Array, likes: Sequence[Any]) -> list[jax.Array]:
    """Returns row `step` of Z: independent N(0, 1) for every leaf."""
    key = jax.random.fold_in(key, step)
    return [
        standard_normal(jax.random.fold_in(key, index), like.shape, like.dtype)
        for index, like in enumerate(likes)
    ]


def _add_noise(
    leaves: Sequence[jax.Array],
    noise: Sequence[jax.Array],
    stddev: float | jax.Array,
    within: jax.Array | None = None,
) -> list[jax.Array]:
    def add(leaf: jax.Array, row: jax.Array) -> jax.Array:
        scale = jnp.asarray(stddev, row.dtype)
        if within is not None:
            scale = scale * within.astype(row.dtype)
        return (leaf.astype(row.dtype) + row * scale).astype(leaf.dtype)

    return [add(leaf, row) for leaf, row in zip(leaves, noise, strict=True)]
