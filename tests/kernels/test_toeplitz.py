"""Toeplitz strategies against dense matrices, brute force and the numbers of JAX Privacy 2.0.0."""

import itertools

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from dpkernels.accounting import amplified_bandmf_event
from dpkernels.matrix_factorization import sensitivity as se
from dpkernels.matrix_factorization import toeplitz as tz
from dpkernels.matrix_factorization.optimization import optimize

COEF = [1.0, 0.5, 0.25]
N = 6


def dense(coef, n=N):
    column = np.zeros(n)
    column[: len(coef)] = coef[:n]
    return linalg.toeplitz(column, np.zeros(n))


def worst_squared(C, min_sep, most):
    """The squared sensitivity over every pattern and every sign."""
    moved = [0.0]
    for chosen in itertools.product([-1, 0, 1], repeat=C.shape[1]):
        steps = np.flatnonzero(chosen)
        if (np.diff(steps) >= min_sep).all() and len(steps) <= most:
            moved.append(float(np.square(C @ np.array(chosen)).sum()))
    return max(moved)


def test_matrices_hold_their_coefficients():
    np.testing.assert_array_equal(tz.materialize_lower_triangular(COEF, N), dense(COEF))
    np.testing.assert_array_equal(tz.materialize_lower_triangular(COEF), dense(COEF, 3))
    np.testing.assert_array_equal(tz.materialize_lower_triangular(COEF, 2), dense(COEF, 2))


@pytest.mark.parametrize("n", [1, 2, 3, 6, None])
def test_padding_cuts_or_adds_zeros(n):
    expected = (COEF + [0.0] * 3)[: n or 3]
    np.testing.assert_array_equal(tz.pad_coefs_to_n(COEF, n), expected)


@pytest.mark.parametrize("shape", [(N,), (N, 2), (N, 2, 3), (2,)])
def test_solving_undoes_multiplying(shape):
    x = np.random.default_rng(0).normal(size=shape)
    rhs = np.tensordot(dense(COEF, len(x)), x, axes=1)
    np.testing.assert_allclose(tz.solve_banded(COEF, rhs), x, rtol=1e-12, atol=1e-14)


def test_products_are_those_of_matrices():
    other = [2.0, -1.0, 0.5, 0.25]
    expected = (dense(COEF) @ dense(other))[:, 0]
    np.testing.assert_allclose(tz.multiply(COEF, other, n=N), expected, rtol=1e-14)
    np.testing.assert_allclose(tz.multiply(COEF, COEF), (dense(COEF) @ dense(COEF))[:3, 0])


@pytest.mark.parametrize("n", [1, 2, 6])
def test_inverses_are_those_of_matrices(n):
    expected = np.linalg.inv(dense(COEF, n))[:, 0]
    np.testing.assert_allclose(tz.inverse_coef(COEF, n), expected, atol=1e-15)


def test_sensitivity_is_the_first_columns():
    expected = [se.single_participation_sensitivity(dense(COEF, n)) ** 2 for n in (2, 3, 10)]
    assert [tz.sensitivity_squared(COEF, n) for n in (2, 3, 10)] == pytest.approx(expected)
    assert tz.sensitivity_squared(COEF) == 1.3125


@pytest.mark.parametrize(
    ("min_sep", "most"), [(1, 8), (1, 2), (2, 8), (2, 3), (3, 8), (3, 1), (9, 8)]
)
@pytest.mark.parametrize("coef", [COEF, [1.0], [1.0, 1.0, 1.0, 0.2], [0.3, 0.3]])
def test_minsep_sensitivity_is_exact_for_falling_coefficients(coef, min_sep, most):
    expected = worst_squared(dense(coef, 8), min_sep, most)
    found = tz.minsep_sensitivity_squared(coef, min_sep, n=8, max_participations=most)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("min_sep", "most"), [(1, 8), (2, 3), (3, 8)])
@pytest.mark.parametrize("coef", [[1.0, -0.5, 0.25], [0.2, 1.0, -0.7], [1.0, 0.0, 0.0, 0.5]])
def test_minsep_sensitivity_is_never_below_for_others(coef, min_sep, most):
    expected = worst_squared(dense(coef, 8), min_sep, most)
    found = tz.minsep_sensitivity_squared(coef, min_sep, n=8, max_participations=most)
    assert found >= expected * (1 - 1e-12)


def test_minsep_sensitivity_of_jax_privacy():
    # JAX Privacy 2.0.0 on the same arguments.
    assert tz.minsep_sensitivity_squared(COEF, 3, n=10) == 4.9375
    assert tz.minsep_sensitivity_squared(COEF, 1, n=10) == 27.75
    assert tz.minsep_sensitivity_squared(COEF, 2, n=10, max_participations=2) == 3.125


@pytest.mark.parametrize("workload", [None, [1.0, 0.9], [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]])
def test_per_query_error_is_the_norm_of_rows(workload):
    A = np.tril(np.ones((N, N))) if workload is None else dense(workload)
    inverse = np.linalg.inv(dense(COEF))
    expected = np.square(A @ inverse).sum(axis=1)
    of_strategy = tz.per_query_error(strategy_coef=COEF, n=N, workload_coef=workload)
    of_noising = tz.per_query_error(noising_coef=inverse[:, 0], n=N, workload_coef=workload)
    np.testing.assert_allclose(of_strategy, expected, rtol=1e-12)
    np.testing.assert_allclose(of_noising, expected, rtol=1e-12)


def test_per_query_error_counts_banded_noise_to_the_end():
    # JAX Privacy 2.0.0 stops after as many rows as there are coefficients.
    expected = np.square(np.tril(np.ones((N, N))) @ dense(COEF)).sum(axis=1)
    np.testing.assert_allclose(tz.per_query_error(noising_coef=COEF, n=N), expected)


@pytest.mark.parametrize("reduction_fn", [jnp.mean, jnp.max])
def test_loss_is_sensitivity_times_error(reduction_fn):
    error = reduction_fn(tz.per_query_error(strategy_coef=COEF, n=N))
    found = tz.loss(COEF, N, reduction_fn=reduction_fn)
    assert found == pytest.approx(1.3125 * float(error), rel=1e-6)


def test_loss_does_not_change_with_scale():
    assert tz.loss(COEF, N) == pytest.approx(tz.loss(np.multiply(COEF, 7), N), rel=1e-12)
    assert tz.loss(COEF, N) == pytest.approx(2.2686767578125, rel=1e-12)  # JAX Privacy 2.0.0.


def test_loss_has_a_gradient():
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(lambda coef: tz.loss(coef, N)))(jnp.asarray(COEF))
    for i, step in enumerate(1e-6 * np.eye(3)):
        slope = (tz.loss(COEF + step, N) - tz.loss(COEF - step, N)) / 2e-6
        assert gradient[i] == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_numbers_are_float64_whatever_jax_is_set_to():
    exact = [np.float64(1) / 3, np.float64(1) / 7]
    assert tz.inverse_coef(exact, 1).dtype == np.float64
    assert tz.sensitivity_squared(exact) == pytest.approx(1 / 9 + 1 / 49, rel=1e-15)


def test_functions_of_concrete_arrays_work_under_jit():
    found = jax.jit(lambda x: x * tz.loss(COEF, 3) * tz.inverse_coef(COEF, 3))(jnp.ones(3))
    np.testing.assert_allclose(found, tz.loss(COEF, 3) * np.array([1, -0.5, 0]), rtol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda coef: tz.pad_coefs_to_n(coef, 5),
        lambda coef: tz.materialize_lower_triangular(coef, 4),
        lambda coef: tz.inverse_coef(coef, 5),
        lambda coef: tz.solve_banded(coef, np.ones((4, 2))),
        lambda coef: tz.multiply(coef, [1.0, 2.0], n=5),
        lambda coef: tz.minsep_sensitivity_squared(coef, 2, n=7, max_participations=2),
        lambda coef: tz.per_query_error(noising_coef=coef, n=5),
        lambda coef: tz.loss(coef, 5),
    ],
)
def test_traced_coefficients_give_the_same(function):
    found = jax.jit(function)(jnp.asarray(COEF))
    np.testing.assert_allclose(found, function(COEF), rtol=1e-5)


def test_optimal_max_error_factors_multiply_to_prefix_sums():
    strategy = tz.optimal_max_error_strategy_coefs(6)
    assert strategy[:5].tolist() == [1, 0.5, 0.375, 0.3125, 0.2734375]
    np.testing.assert_allclose(tz.multiply(strategy, strategy), np.ones(6))
    noising = tz.optimal_max_error_noising_coefs(6)
    assert noising[:5].tolist() == [1, -0.5, -0.125, -0.0625, -0.0390625]
    np.testing.assert_allclose(tz.multiply(strategy, noising), np.eye(6)[0], atol=1e-15)


@pytest.mark.parametrize("coef", [COEF, [2.0, -1.0], [0.5], [*COEF, 0.0, 0.0], [1.0] * 9])
def test_streamed_inverse_is_the_inverse(coef):
    streamed = tz.inverse_as_streaming_matrix(coef).materialize(N)
    np.testing.assert_allclose(streamed, np.linalg.inv(dense(coef)), rtol=1e-5, atol=1e-6)


def test_streamed_inverse_remembers_one_row_less_than_bands():
    def held(coef):
        state = tz.inverse_as_streaming_matrix(coef).init_multiply(jnp.zeros(10))
        return sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)

    assert [held(COEF), held([*COEF, 0.0]), held([2.0])] == [20, 20, 0]


def test_streamed_inverse_does_not_drift():
    coef, n = tz.optimal_max_error_strategy_coefs(5), 3000
    streamed = tz.inverse_as_streaming_matrix(coef) @ jnp.ones(n)
    np.testing.assert_allclose(streamed, tz.solve_banded(coef, np.ones(n)), rtol=1e-5)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("n", [2, 3, 6])
def test_column_normalized_strategies_have_unit_columns(scale, n):
    # In JAX Privacy a strategy of norm 0.5 got half the noise that its accounting assumed.
    coef = scale * np.array(COEF)
    with jax.enable_x64(True):
        inverse = np.asarray(tz.inverse_as_streaming_matrix(coef, n).materialize(n))
    strategy = np.linalg.inv(inverse)
    np.testing.assert_allclose(np.linalg.norm(strategy, axis=0), np.ones(n), rtol=1e-12)
    columns = dense(coef, n)
    np.testing.assert_allclose(strategy, columns / np.linalg.norm(columns, axis=0), atol=1e-12)


def test_column_normalized_inverse_ends():
    inverse = tz.inverse_as_streaming_matrix(COEF, 4)
    assert inverse.num_rows == 4
    with pytest.raises(IndexError, match="`n` must be at most 4"):
        inverse.materialize(5)


@pytest.mark.parametrize(
    ("n", "bands", "reduction_fn", "expected"),
    [  # JAX Privacy 2.0.0.
        (100, 4, jnp.mean, [0.68298258, 0.48280221, 0.41445756, 0.35869451]),
        (20, 4, jnp.max, [0.7383839, 0.46562401, 0.37644835, 0.31027432]),
        (100, 1, jnp.mean, [1.0]),
    ],
)
def test_optimized_strategies_are_those_of_jax_privacy(n, bands, reduction_fn, expected):
    coef = tz.optimize_banded_toeplitz(n, bands, reduction_fn=reduction_fn)
    np.testing.assert_allclose(coef, expected, atol=1e-6)
    assert np.linalg.norm(coef) == pytest.approx(1, abs=1e-12)


def test_optimized_strategies_start_where_they_are_told():
    start = [2.0, 1.0, 0.1]
    coef = tz.optimize_banded_toeplitz(10, 3, strategy_coef=start, max_optimizer_steps=0)
    np.testing.assert_allclose(coef, start / np.linalg.norm(start))


@pytest.mark.slow
def test_optimize_coefs_for_amplifications_meets_its_budget():
    coef, stddev = tz.optimize_coefs_for_amplifications(
        12, dataset_size=20, expected_batch_size=10, epsilon=8.0, delta=1e-5
    )
    accountant = dp_accounting.rdp.RdpAccountant()
    event = amplified_bandmf_event(stddev, 12, num_bands=len(coef), sampling_prob=len(coef) / 2)
    assert 8.0 - 1e-3 < accountant.compose(event).get_epsilon(1e-5) <= 8.0
    assert np.linalg.norm(coef) == pytest.approx(1, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epsilon", "bands", "stddev"),
    [(20.0, 10, 1.02193), (2.0, 1, 2.66989), (0.1, 1, 41.58493)],  # JAX Privacy 2.0.0.
)
def test_optimize_coefs_for_amplifications_as_jax_privacy(epsilon, bands, stddev):
    coef, found = tz.optimize_coefs_for_amplifications(
        100, dataset_size=1000, expected_batch_size=100, epsilon=epsilon, delta=1e-6
    )
    assert len(coef) == bands
    assert found == pytest.approx(stddev, rel=1e-5)


def test_optimize_refuses_a_loss_that_is_not_finite():
    with pytest.raises(RuntimeError, match="`loss_fn` must be finite, got nan"):
        optimize(lambda x: jnp.sum(jnp.log(x)), np.array([-1.0]))


def test_optimize_keeps_the_structure():
    start = {"a": 0, "b": np.zeros(2, np.float32)}
    found = optimize(lambda p: (p["a"] - 1) ** 2 + jnp.sum((p["b"] + 2) ** 2), start)
    assert found["a"] == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(found["b"], [-2, -2], atol=1e-6)


def amplified(dataset_size=100, expected_batch_size=10, epsilon=1.0, delta=1e-5):
    return tz.optimize_coefs_for_amplifications(
        10,
        dataset_size=dataset_size,
        expected_batch_size=expected_batch_size,
        epsilon=epsilon,
        delta=delta,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tz.pad_coefs_to_n([]), "`coef` must be a non-empty vector"),
        (lambda: tz.pad_coefs_to_n([[1.0]]), "`coef` must be a non-empty vector"),
        (lambda: tz.pad_coefs_to_n(COEF, 0), "`n` must be at least 1"),
        (lambda: tz.sensitivity_squared([1.0, np.nan]), "`coef` must be finite"),
        (lambda: tz.inverse_coef([0.0, 1.0]), "`coef` must not start with zero"),
        (lambda: tz.solve_banded([0.0, 1.0], np.ones(2)), "`coef` must not start with zero"),
        (lambda: tz.solve_banded(COEF, 1.0), "`rhs` must have an axis"),
        (lambda: tz.inverse_as_streaming_matrix([0.0]), "`coef` must not start with zero"),
        (lambda: tz.inverse_as_streaming_matrix(COEF, 0), "`column_normalize_for_n` must be at"),
        (lambda: tz.multiply(COEF, [1.0]), "`n` must be given"),
        (lambda: tz.per_query_error(), "`strategy_coef` or `noising_coef` must be given"),
        (lambda: tz.per_query_error(strategy_coef=COEF, noising_coef=COEF), "and not both"),
        (lambda: tz.minsep_sensitivity_squared(COEF, 0, n=3), "`min_sep` must be at least 1"),
        (lambda: tz.optimize_banded_toeplitz(3, 4), "`bands` must be at most n = 3"),
        (
            lambda: tz.optimize_banded_toeplitz(3, 2, strategy_coef=[1.0]),
            "must have 2 coefficients",
        ),
        (
            lambda: tz.optimize_banded_toeplitz(3, 2, max_optimizer_steps=-1),
            "`max_optimizer_steps`",
        ),
        (lambda: amplified(dataset_size=9), "`expected_batch_size` must be at most"),
        (lambda: amplified(expected_batch_size=0), "`expected_batch_size` must be at least 1"),
        (lambda: amplified(epsilon=0.0), "`epsilon` must be positive"),
        (lambda: amplified(delta=1.0), r"`delta` must be in \(0, 1\)"),
    ],
)
def test_arguments_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
