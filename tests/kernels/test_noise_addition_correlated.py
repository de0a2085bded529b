"""Correlated noise: that it is the dense product, that it ends, that it goes on from its state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpkernels.gaussian import standard_normal
from dpkernels.matrix_factorization import StreamingMatrix, toeplitz
from dpkernels.matrix_factorization import streaming_matrix as sm
from dpkernels.noise_addition import (
    CorrelatedNoiseState,
    gaussian_privatizer,
    make_key,
    matrix_factorization_privatizer,
)
from oracles import QUICK_TO_COMPILE

STEPS = 6
COEF = [1.0, 0.5, 0.25]
SUMS = {"a": jnp.zeros(5), "b": [jnp.zeros((2, 3))]}
STRATEGY = np.asarray(toeplitz.materialize_lower_triangular(COEF, STEPS))
INVERSE = np.linalg.inv(STRATEGY)
NORMALIZED = np.linalg.inv(STRATEGY / np.linalg.norm(STRATEGY, axis=0))
SQUARE = np.random.default_rng(0).normal(size=(STEPS, STEPS + 1))
NOISES = {
    "streamed": (toeplitz.inverse_as_streaming_matrix(COEF), INVERSE),
    "normalized": (toeplitz.inverse_as_streaming_matrix(COEF, STEPS), NORMALIZED),
    "product": (sm.prefix_sum() @ sm.diagonal(np.arange(1.0, 7.0)), np.tri(6) * np.arange(1, 7)),
    "dense": (INVERSE, INVERSE),
    "neither_square_nor_triangular": (jnp.asarray(SQUARE), SQUARE),
}
names = pytest.mark.parametrize("name", NOISES)
ending = pytest.mark.parametrize("name", ["normalized", "product", "dense"])
jitted = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])


def run(privatizer, sums=SUMS, *, steps=STEPS, jit=True, state=None):
    update = compiled(privatizer.update) if jit else privatizer.update
    state, rows = privatizer.init(sums) if state is None else state, []
    for _ in range(steps):
        noised, state = update(sums, state)
        rows.append(noised)
    return rows, state


@functools.cache
def compiled(update):
    return jax.jit(update, compiler_options=QUICK_TO_COMPILE)


@functools.cache
def plain(name):
    """A privatizer that tests share, so that it is compiled once."""
    return matrix_factorization_privatizer(NOISES[name][0], stddev=1.0, prng_key=7)


def draws(seed, steps, sums=SUMS, dtype=jnp.float32):
    """Z in float64, `(step, ...)` for each leaf, made from the key alone."""

    @functools.partial(jax.jit, compiler_options=QUICK_TO_COMPILE)
    def row(step):
        key = jax.random.fold_in(make_key(seed), step)
        return [
            standard_normal(jax.random.fold_in(key, index), leaf.shape, dtype)
            for index, leaf in enumerate(jax.tree.leaves(sums))
        ]

    return leaves([row(jnp.uint32(step)) for step in range(steps)])


def leaves(rows):
    """A float64 array `(step, ...)` for each leaf."""
    return [
        np.stack(each).astype(np.float64) for each in zip(*map(jax.tree.leaves, rows), strict=True)
    ]


@names
def test_noise_is_the_dense_product(name):
    dense = NOISES[name][1]
    for found, z in zip(leaves(run(plain(name))[0]), draws(7, dense.shape[1]), strict=True):
        np.testing.assert_allclose(found, np.tensordot(dense, z, axes=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["streamed", "dense"])
def test_noise_without_jit_is_the_same(name):
    sums = [jnp.zeros(4)]
    eager, _ = run(plain(name), sums, jit=False, steps=2)
    expected, _ = run(plain(name), sums, steps=2)
    np.testing.assert_allclose(leaves(eager)[0], leaves(expected)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["streamed", "dense"])
def test_noise_is_proportional_to_its_scale(name):
    noise = matrix_factorization_privatizer(NOISES[name][0], stddev=3.0, prng_key=7)
    for found, single in zip(leaves(run(noise)[0]), leaves(run(plain(name))[0]), strict=True):
        np.testing.assert_allclose(found, 3.0 * single, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["normalized", "dense"])
@pytest.mark.parametrize("given", [None, jnp.float64])
def test_noise_in_float64_is_the_dense_product(name, given):
    matrix, dense = NOISES[name]
    with jax.enable_x64(True):
        sums = [jnp.zeros(4, jnp.float64 if given is None else jnp.float32)]
        noise = matrix_factorization_privatizer(matrix, stddev=1.0, prng_key=7, dtype=given)
        rows, state = run(noise, sums)
        (z,) = draws(7, STEPS, sums, jnp.float64)
    exact = 1e-13 if given is None else 1e-7  # Rounded once, to the type of the sums.
    expected = np.tensordot(dense, z, axes=1)
    np.testing.assert_allclose(leaves(rows)[0], expected, rtol=exact, atol=1e-14)
    assert all(b.dtype != jnp.float32 for b in jax.tree.leaves(getattr(state, "buffers", ())))


def test_noise_has_the_covariance_of_the_mechanism():
    # 50,000 coordinates: one of the 21 entries of C⁻¹C⁻ᵀ is off by 6 sigma with probability 4e-8,
    # and 6 sigma are 4 % of a variance. What it catches is a wrong band, a lost correlation, or a
    # scale that is wrong by 5 %.
    size = 50_000
    matrix, dense = NOISES["normalized"]
    rows, _ = run(
        matrix_factorization_privatizer(matrix, stddev=2.0, prng_key=1), [jnp.zeros(size)]
    )
    found = np.cov(leaves(rows)[0])
    expected = 4.0 * dense @ dense.T
    variances = np.diagonal(expected)
    sigma = np.sqrt((np.outer(variances, variances) + expected**2) / size)
    assert (np.abs(found - expected) < 6 * sigma).all()
    assert not (np.abs(1.1 * found - expected) < 6 * sigma).all()


@pytest.mark.parametrize("matrix", [NOISES["streamed"][0], INVERSE], ids=["streamed", "dense"])
def test_noise_is_independent_between_leaves(matrix):
    # 72 pairs at 6 sigma: 1e-7. A draw shared between leaves correlates by 0.4 or more.
    size = 20_000
    sums = [jnp.zeros(size), jnp.zeros(size)]
    first, second = leaves(
        run(matrix_factorization_privatizer(matrix, stddev=1.0, prng_key=2), sums)[0]
    )
    across = np.corrcoef(np.concatenate([first, second]))[:STEPS, STEPS:]
    assert np.abs(across).max() < 6 / size**0.5


@names
def test_noise_never_repeats(name):
    rows, _ = run(plain(name))
    words = np.concatenate([leaf.ravel() for leaf in leaves(rows)])
    assert len(set(words.tolist())) == words.size


@pytest.mark.parametrize(
    "matrix",
    [
        sm.identity(),
        toeplitz.inverse_as_streaming_matrix([1.0, 0.0]),
        toeplitz.inverse_as_streaming_matrix([0.5], STEPS),
    ],
    ids=["identity", "one_band", "one_band_normalized"],
)
@jitted
def test_noise_of_the_identity_is_independent_noise_to_the_bit(matrix, jit):
    sums = [jnp.arange(4.0), jnp.ones(4)]
    noise = matrix_factorization_privatizer(matrix, stddev=0.7, prng_key=3)
    correlated, _ = run(noise, sums, jit=jit, steps=2)
    independent, _ = run(gaussian_privatizer(stddev=0.7, prng_key=3), sums, jit=jit, steps=2)
    for found, expected in zip(leaves(correlated), leaves(independent), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_noise_of_a_dense_identity_is_independent_noise():
    correlated, _ = run(matrix_factorization_privatizer(np.eye(STEPS), stddev=0.7, prng_key=3))
    independent, _ = run(gaussian_privatizer(stddev=0.7, prng_key=3))
    for found, expected in zip(leaves(correlated), leaves(independent), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@names
def test_noise_continues_from_a_saved_state(name):
    expected, _ = run(plain(name))
    _, state = run(plain(name), steps=3)
    saved = [np.asarray(leaf) for leaf in jax.tree.leaves(state._replace(key=None))]
    key_data = np.asarray(jax.random.key_data(state.key))
    # Elsewhere, into the state of a privatizer that has drawn a key of its own.
    other = matrix_factorization_privatizer(NOISES[name][0], stddev=1.0).init(SUMS)
    structure = jax.tree.structure(other._replace(key=None))
    restored = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in saved])
    restored = restored._replace(
        key=jax.random.wrap_key_data(jnp.asarray(key_data), impl="threefry2x32")
    )
    rows, _ = run(plain(name), steps=3, state=restored)
    for found, whole in zip(leaves(rows), leaves(expected[3:]), strict=True):
        np.testing.assert_array_equal(found, whole)


@names
def test_states_are_pytrees_of_arrays(name):
    _, state = run(plain(name), steps=2)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert int(state.step) == 2


def test_dense_noise_holds_nothing_between_updates():
    state = matrix_factorization_privatizer(INVERSE, stddev=1.0).init(SUMS)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2


@pytest.mark.parametrize("name", ["streamed", "dense"])
def test_noise_on_half_precision_is_made_in_float32(name):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), SUMS)
    rows, state = run(plain(name), half)
    wide, wide_state = run(plain(name))
    for row, expected in zip(rows, wide, strict=True):
        for leaf, whole in zip(jax.tree.leaves(row), jax.tree.leaves(expected), strict=True):
            assert leaf.dtype == jnp.bfloat16
            np.testing.assert_array_equal(leaf, whole.astype(jnp.bfloat16))
    if isinstance(state, CorrelatedNoiseState):
        kept = zip(*map(jax.tree.leaves, (state.buffers, wide_state.buffers)), strict=True)
        assert all((one == two).all() and one.dtype == two.dtype for one, two in kept)


@names
def test_noise_does_not_depend_on_the_sums(name):
    large = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1024.0), SUMS)
    found, _ = run(plain(name), large)
    expected, _ = run(plain(name))
    for with_sums, alone in zip(leaves(found), leaves(expected), strict=True):
        np.testing.assert_allclose(with_sums - 1024.0, alone, atol=1e-3)


def test_noise_of_the_operating_system_differs_each_time():
    privatizer = matrix_factorization_privatizer(INVERSE, stddev=1.0)
    one, two = (run(privatizer, steps=1, state=privatizer.init(SUMS))[0] for _ in range(2))
    assert not np.array_equal(one[0]["a"], two[0]["a"])


@pytest.mark.parametrize("name", ["normalized", "dense"])
def test_zero_noise_changes_nothing(name):
    sums = {"w": jnp.arange(4.0)}
    rows, _ = run(matrix_factorization_privatizer(NOISES[name][0], stddev=0.0), sums, steps=2)
    np.testing.assert_array_equal(leaves(rows)[0], [np.arange(4.0)] * 2)


@ending
def test_past_the_last_row_an_update_is_refused(name):
    # JAX Privacy 2.0.0 repeats the last row: the difference of two updates is without noise.
    _, state = run(plain(name))
    with pytest.raises(IndexError, match="got 6 rows and 6 updates before this one"):
        plain(name).update(SUMS, state)


@ending
def test_past_the_last_row_a_traced_update_is_nan(name):
    rows, _ = run(plain(name), steps=STEPS + 3)
    for leaf in leaves(rows):
        assert np.isfinite(leaf[:STEPS]).all()
        assert np.isnan(leaf[STEPS:]).all()


@pytest.mark.parametrize("name", ["normalized", "dense"])
def test_past_the_last_row_zero_noise_is_nan_too(name):
    privatizer = matrix_factorization_privatizer(NOISES[name][0], stddev=0.0)
    rows, _ = run(privatizer, {"w": jnp.ones(2)}, steps=STEPS + 1)
    assert [bool(np.isnan(row["w"]).all()) for row in rows] == [False] * STEPS + [True]


def test_past_the_last_row_a_matrix_of_the_users_is_nan():
    # It repeats its last row by itself; that it has an end is all that is known of it.
    endless = StreamingMatrix(lambda like: (), lambda row, state: (row, state), num_rows=2)
    rows, _ = run(matrix_factorization_privatizer(endless, stddev=1.0), steps=3)
    assert [bool(np.isnan(row["a"]).all()) for row in rows] == [False, False, True]


@pytest.mark.parametrize("stddev", [-1.0, float("nan"), float("inf"), jnp.float32(-1)])
@pytest.mark.parametrize("matrix", [sm.identity(), np.eye(2)])
def test_a_scale_out_of_range_is_refused(matrix, stddev):
    with pytest.raises(ValueError, match="`stddev` must be non-negative and finite"):
        matrix_factorization_privatizer(matrix, stddev=stddev)


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (np.ones(3), ValueError, "`matrix` must have two axes"),
        ([[1.0]], TypeError, "`matrix` must be a StreamingMatrix or an array"),
        (np.array([[np.nan]]), ValueError, "`noising_matrix` must be finite"),
        (np.array([[1e300]]), ValueError, "`noising_matrix` must be finite in float32"),
        (np.diag([1.0, 0.0]), ValueError, "must have no row of zeros, got one at 1"),
        (np.diag([1e-50, 1.0]), ValueError, "must have no row of zeros, got one at 0"),
    ],
)
def test_a_matrix_that_makes_no_noise_is_refused(matrix, error, message):
    with pytest.raises(error, match=message):
        matrix_factorization_privatizer(matrix, stddev=1.0)


@pytest.mark.parametrize("matrix", [sm.identity(), np.eye(2)])
def test_noise_on_integers_is_refused(matrix):
    privatizer = matrix_factorization_privatizer(matrix, stddev=1.0)
    with pytest.raises(NotImplementedError, match="need discrete Gaussian noise"):
        run(privatizer, {"w": jnp.zeros(3, jnp.int32)}, steps=1, jit=False)


def test_noise_in_half_precision_is_refused():
    with pytest.raises(TypeError, match="`dtype` must be float32 or float64"):
        matrix_factorization_privatizer(sm.identity(), stddev=1.0, dtype=jnp.bfloat16)
