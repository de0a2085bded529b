"""The same numbers as JAX Privacy 2.0.0, where it is installed and where it is right."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpkernels.matrix_factorization import sensitivity, streaming_matrix, toeplitz

COEF = np.array([1.0, 0.6, 0.3, 0.1])
DENSE = np.tril(np.random.default_rng(0).normal(size=(6, 6)))
BANDED = np.tril(np.triu(DENSE, -2))


@pytest.fixture(scope="module")
def theirs():
    # Its dependencies warn where they are imported, and warnings are errors here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("jax_privacy.matrix_factorization")


TOEPLITZ = {
    "pad_coefs_to_n": lambda tz: tz.pad_coefs_to_n(COEF, 6),
    "materialize": lambda tz: tz.materialize_lower_triangular(COEF, 6),
    "solve_banded": lambda tz: tz.solve_banded(COEF, jnp.arange(1.0, 8.0)),
    "multiply": lambda tz: tz.multiply(COEF, COEF, n=6),
    "inverse_coef": lambda tz: tz.inverse_coef(COEF, 6),
    "max_error_strategy": lambda tz: tz.optimal_max_error_strategy_coefs(7),
    "max_error_noising": lambda tz: tz.optimal_max_error_noising_coefs(7),
    "sensitivity_squared": lambda tz: tz.sensitivity_squared(COEF, 3),
    "minsep_1": lambda tz: tz.minsep_sensitivity_squared(COEF, 1, n=9),
    "minsep_2": lambda tz: tz.minsep_sensitivity_squared(COEF, 2, n=9, max_participations=3),
    "minsep_4": lambda tz: tz.minsep_sensitivity_squared(COEF, 4, n=9),
    "per_query_error": lambda tz: tz.per_query_error(strategy_coef=COEF, n=9),
    "workload": lambda tz: tz.per_query_error(strategy_coef=COEF, n=9, workload_coef=COEF[:2]),
    "noising": lambda tz: tz.per_query_error(noising_coef=COEF),
    "loss": lambda tz: tz.loss(COEF, 9),
    "optimized": lambda tz: tz.optimize_banded_toeplitz(30, 3),
    "streamed": lambda tz: tz.inverse_as_streaming_matrix(COEF).materialize(6),
    "normalized": lambda tz: tz.inverse_as_streaming_matrix(
        COEF / np.linalg.norm(COEF), 6
    ).materialize(6),
}
SENSITIVITY = {
    "single": lambda se: se.single_participation_sensitivity(DENSE),
    "true_max": lambda se: se.minsep_true_max_participations(10, 3, max_participations=3),
    "linear": lambda se: se.max_participation_for_linear_fn(DENSE[5], 2, max_participations=2),
    "upper_bound": lambda se: se.get_min_sep_sensitivity_upper_bound(DENSE, 2),
    "upper_bound_few": lambda se: se.get_min_sep_sensitivity_upper_bound(
        DENSE, 2, max_participations=2
    ),
    "banded": lambda se: se.get_sensitivity_banded(BANDED, 3),
    "epochs": lambda se: se.fixed_epoch_sensitivity(DENSE, 3),
    "mask": lambda se: se.banded_lower_triangular_mask(5, 2),
    "symmetric_mask": lambda se: se.banded_symmetric_mask(5, 2),
}
STREAMING = {
    "identity": lambda sm: sm.identity().materialize(4),
    "prefix_sum": lambda sm: sm.prefix_sum().row_norms_squared(4),
    "diagonal": lambda sm: sm.diagonal(jnp.array([1.0, 2.0, 3.0])).materialize(3),
    "momentum": lambda sm: sm.momentum_sgd_matrix(0.9, jnp.array([1.0, 0.5, 0.25])).materialize(3),
    "product": lambda sm: (sm.prefix_sum() @ sm.prefix_sum()).materialize(4),
    "scaled": lambda sm: (
        sm.prefix_sum().scale_rows_and_columns(jnp.arange(1.0, 5.0), jnp.ones(4)).materialize(4)
    ),
}


def compare(call, ours, other):
    # Upstream wants JAX arrays in float64 and the promotion that JAX comes with.
    with jax.enable_x64(True):
        found = call(ours)
        with jax.numpy_dtype_promotion("standard"):
            expected = call(other)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("call", TOEPLITZ.values(), ids=TOEPLITZ)
def test_toeplitz_gives_the_same(theirs, call):
    compare(call, toeplitz, pytest.importorskip("jax_privacy.matrix_factorization.toeplitz"))


@pytest.mark.parametrize("call", SENSITIVITY.values(), ids=SENSITIVITY)
def test_sensitivity_gives_the_same(theirs, call):
    compare(call, sensitivity, pytest.importorskip("jax_privacy.matrix_factorization.sensitivity"))


@pytest.mark.parametrize("call", STREAMING.values(), ids=STREAMING)
def test_streaming_matrices_are_the_same(theirs, call):
    name = "jax_privacy.matrix_factorization.streaming_matrix"
    compare(call, streaming_matrix, pytest.importorskip(name))
