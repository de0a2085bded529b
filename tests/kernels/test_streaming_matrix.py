"""Streaming matrices: each is the dense matrix it says, and ends where it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpkernels.matrix_factorization import StreamingMatrix, num_rows
from dpkernels.matrix_factorization import streaming_matrix as sm

ONES = np.tril(np.ones((4, 4)))
MOMENTUM = np.array([[1, 0, 0, 0], [0.9, 1, 0, 0], [0.81, 0.9, 1, 0], [0.729, 0.81, 0.9, 1]])
RATES = [1.0, 0.5, 0.25, 0.125]
KNOWN = {
    "identity": (sm.identity(), np.eye(4)),
    "prefix_sum": (sm.prefix_sum(), ONES),
    "diagonal": (sm.diagonal(RATES), np.diag(RATES)),
    "momentum": (sm.momentum_sgd_matrix(0.9), ONES @ MOMENTUM),
    "learning_rates": (sm.momentum_sgd_matrix(0.9, RATES), ONES @ np.diag(RATES) @ MOMENTUM),
    "product": (sm.prefix_sum() @ sm.momentum_sgd_matrix(0.9), ONES @ ONES @ MOMENTUM),
    "multiple": (sm.prefix_sum() * 2.5, 2.5 * ONES),
    "multiple_from_the_left": (-1 * sm.prefix_sum(), -ONES),
    "rows": (sm.scale_rows_and_columns(sm.prefix_sum(), RATES), np.diag(RATES) @ ONES),
    "columns": (sm.prefix_sum().scale_rows_and_columns(None, RATES), ONES @ np.diag(RATES)),
}
FINITE = {
    "diagonal": sm.diagonal([1.0, 2.0]),
    "rows": sm.prefix_sum().scale_rows_and_columns([1.0, 2.0]),
    "columns": sm.prefix_sum().scale_rows_and_columns(col_scale=[1.0, 2.0]),
    "multiple": 2 * sm.diagonal([1.0, 2.0]),
    "shorter_of_two": sm.diagonal(np.ones(5)) @ sm.diagonal(np.ones(2)),
    "learning_rates": sm.momentum_sgd_matrix(0.5, [1.0, 2.0]),
}
known = pytest.mark.parametrize(("matrix", "dense"), KNOWN.values(), ids=KNOWN)
finite = pytest.mark.parametrize("matrix", FINITE.values(), ids=FINITE)


def rows(matrix, inputs, *, jit=False):
    following = jax.jit(matrix.multiply_next) if jit else matrix.multiply_next
    state, outputs = matrix.init_multiply(inputs[0]), []
    for each in inputs:
        output, state = following(each, state)
        outputs.append(output)
    return outputs


@known
def test_materialize_returns_the_matrix(matrix, dense):
    np.testing.assert_allclose(matrix.materialize(4), dense, rtol=1e-6, atol=1e-7)


@known
def test_row_norms_squared_are_those_of_the_matrix(matrix, dense):
    expected = np.square(dense).sum(axis=1)
    np.testing.assert_allclose(matrix.row_norms_squared(4), expected, rtol=1e-6)


@known
def test_streamed_pytrees_are_products(matrix, dense):
    x = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    inputs = [{"a": jnp.asarray(row[0]), "b": [jnp.asarray(row[1:])]} for row in x]
    expected = np.einsum("ts,sij->tij", dense, x)
    for t, output in enumerate(rows(matrix, inputs)):
        np.testing.assert_allclose(output["a"], expected[t, 0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(output["b"][0], expected[t, 1:], rtol=1e-5, atol=1e-6)


def test_a_matrix_times_an_array_keeps_its_axes():
    x = jnp.arange(24.0).reshape(4, 3, 2)
    np.testing.assert_allclose(sm.prefix_sum() @ x, np.cumsum(x, axis=0))


def test_half_precision_is_summed_in_float32():
    # In bfloat16 a sum of ones stops at 256.
    total = sm.prefix_sum() @ jnp.ones(1000, jnp.bfloat16)
    assert total.dtype == jnp.bfloat16
    assert float(total[-1]) == 1000


def test_float64_stays_float64():
    with jax.enable_x64(True):
        product = sm.momentum_sgd_matrix(1 / 3) @ jnp.ones(3)
    assert product.dtype == jnp.float64
    np.testing.assert_allclose(product, [1, 7 / 3, 34 / 9], rtol=1e-15)


def test_float64_stays_float64_after_a_trace_in_float32():
    # JAX caches what a NumPy array was traced as, which is float32 by default.
    for matrix in (sm.diagonal([1 / 3]), sm.scale_rows_and_columns(sm.identity(), [1 / 3])):
        rows(matrix, [jnp.ones(1)], jit=True)
        with jax.enable_x64(True):
            state = matrix.init_multiply(jnp.ones(1))
            product, _ = jax.jit(lambda *args, m=matrix: m.multiply_next(*args))(jnp.ones(1), state)
        assert product.tolist() == [1 / 3]


def test_states_are_pytrees_of_arrays():
    for matrix, _ in KNOWN.values():
        state = matrix.init_multiply({"w": jnp.zeros(3)})
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


def test_from_array_implementation_takes_leaves_one_by_one():
    def after(row, last):
        return last, row

    delay = StreamingMatrix.from_array_implementation(jnp.zeros_like, after, num_rows=3)
    first, second = rows(delay, [{"a": jnp.ones(2), "b": jnp.full(1, 2.0)}] * 2)
    assert (first["a"].tolist(), first["b"].tolist()) == ([0, 0], [0])
    assert (second["a"].tolist(), second["b"].tolist()) == ([1, 1], [2])
    assert delay.num_rows == 3


def test_num_rows_of_matrices_without_end_is_none():
    assert [num_rows(m) for m in (sm.identity(), sm.prefix_sum() @ sm.identity())] == [None, None]


@finite
def test_num_rows_counts_those_of_the_shortest(matrix):
    assert num_rows(matrix) == 2


def test_num_rows_of_a_dense_matrix():
    assert num_rows(np.ones((3, 5))) == 3
    with pytest.raises(ValueError, match="`matrix` must have two axes"):
        num_rows(np.ones(3))
    with pytest.raises(TypeError, match="`matrix` must be a StreamingMatrix or an array"):
        num_rows([[1.0]])


@finite
def test_past_the_end_a_step_is_refused(matrix):
    with pytest.raises(IndexError, match="`step` must be below 2, the number of rows, got 2"):
        rows(matrix, [jnp.ones(1)] * 3)


@finite
def test_past_the_end_a_traced_step_is_nan(matrix):
    outputs = np.stack(rows(matrix, [jnp.ones(1)] * 5, jit=True))[:, 0]
    assert np.isfinite(outputs[:2]).all()
    assert np.isnan(outputs[2:]).all()


@finite
def test_past_the_end_nothing_is_materialized(matrix):
    for call in (matrix.materialize, matrix.row_norms_squared, lambda n: matrix @ jnp.ones(n)):
        with pytest.raises(IndexError, match="`n` must be at most 2"):
            call(3)


@pytest.mark.parametrize("diag", [[], [[1.0]], [1.0, np.nan], 1.0])
def test_diagonal_refuses_what_is_no_vector(diag):
    with pytest.raises(ValueError, match="`diag` must be a non-empty vector of finite numbers"):
        sm.diagonal(diag)


@pytest.mark.parametrize(("momentum", "rates"), [(-0.1, None), (0.9, [1.0, 0.0]), (np.inf, None)])
def test_momentum_sgd_matrix_refuses(momentum, rates):
    with pytest.raises(ValueError, match=r"`(momentum|learning_rates)` must be"):
        sm.momentum_sgd_matrix(momentum, rates)


@pytest.mark.parametrize(("factor", "error"), [("2", TypeError), (float("nan"), ValueError)])
def test_multiples_are_by_finite_numbers(factor, error):
    with pytest.raises(error, match="`factor` must be"):
        sm.prefix_sum() * factor


def test_a_matrix_times_a_scalar_array_is_refused():
    with pytest.raises(ValueError, match="`x` must have an axis of rows"):
        sm.prefix_sum() @ jnp.float32(2)
