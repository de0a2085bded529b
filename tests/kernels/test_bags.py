"""Bags of embeddings: a look-up of rows and their sum, as one site."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpkernels
from kernel_checks import temporary_bytes

TABLE = jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)), jnp.float32)
TOKENS = jnp.array([[1, 1, 1, 5], [0, 2, 3, 8], [7, 7, 7, 7]])


def clipped(loss, **options):
    options = {"l2_clip_norm": 0.5, "return_grad_norms": True, "keep_batch_dim": False} | options
    return dpkernels.clipped_grad(loss, **options)


def form_of(loss, *args):
    (row,) = clipped(loss).explain(*args).rows
    return row.form, row.sites


def mean(table, tokens):
    return jnp.sum(jnp.sin(table[tokens].mean(0)))


@pytest.mark.parametrize(
    "loss",
    [
        mean,
        lambda p, i: jnp.sum(jnp.take(p, i, axis=0, mode="clip").sum(0)),
        lambda p, i: jnp.sum(p[i][None].reshape(1, 2, 2, 4).sum((1, 2))),
        lambda p, i: jnp.sum(jnp.squeeze(p[i[None]], 0).sum(0)),
        lambda p, i: jnp.sum(p[:, 0][i].sum()),
    ],
    ids=["mean", "sum", "reshaped", "squeezed", "scalars"],
)
def test_bags_are_counted(loss):
    assert form_of(loss, TABLE, TOKENS) == ("counted", ("gather and sum",))


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, i: jnp.sum(p[i].sum(1)),
        lambda p, i: jnp.sum(p[i].max(0)),
        lambda p, i: jnp.sum(p[i].reshape(2, 2, 4).sum(1) ** 2),
        lambda p, i: jnp.sum(jnp.sin(p[i]).sum(0)),
        lambda p, i: jnp.sum(p[i].reshape(8, 2).sum(0)),
    ],
    ids=["features", "maximum", "two bags", "not linear", "parts of rows"],
)
def test_what_is_no_bag_is_not_taken_for_one(loss):
    assert form_of(loss, TABLE, TOKENS)[1] == ("gather",)


def test_rows_that_are_used_otherwise_are_no_bag():
    def loss(table, tokens):
        rows = table[tokens]
        return jnp.sum(rows.sum(0)) + jnp.sum(jnp.square(rows))

    assert form_of(loss, TABLE, TOKENS)[1] == ("gather",)


def test_norm_is_by_how_often_a_row_was_looked_up():
    _, aux = clipped(lambda p, i: jnp.sum(p[i].sum(0)))(TABLE, TOKENS)
    # |1, 1, 1, 1| is 2; of the counts, the norms are those of (3, 1), (1, 1, 1, 1) and (4).
    np.testing.assert_allclose(aux.grad_norms, [2 * 10**0.5, 4, 8], rtol=1e-6)


def test_rows_outside_have_no_gradient():
    def loss(table, tokens):
        return jnp.sum(table.at[tokens].get(mode="fill", fill_value=0).sum(0))

    sums, aux = clipped(loss, l2_clip_norm=100.0)(TABLE, jnp.array([[20, 3, 20], [20, 20, 20]]))
    np.testing.assert_allclose(aux.grad_norms, [2, 0], rtol=1e-6)
    np.testing.assert_allclose(sums, jnp.zeros((9, 4)).at[3].set(1), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_outside_have_no_gradient_whatever_the_sum_has(bad):
    def loss(table, tokens, x):
        return jnp.sum(table.at[tokens].get(mode="fill", fill_value=0).sum(0) * x)

    tokens, x = jnp.array([[20, 20], [1, 2]]), jnp.array([[bad] * 4, [1.0] * 4])
    sums, _ = clipped(loss, batch_argnums=(1, 2))(TABLE, tokens, x)
    expected = jnp.zeros((9, 4)).at[jnp.array([1, 2])].set(0.5 / 8**0.5)
    np.testing.assert_allclose(sums, expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e6, 1e18, 1e25])
def test_one_row_looked_up_thousands_of_times_stays_within_the_clip_norm(scale):
    """Added up one by one, it would be rounded as often, and to one side."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 4)) * scale, jnp.float32)
    tokens = jnp.full((1, 5000), 3)
    total, _ = clipped(lambda p, i, x: jnp.sum(p[i].sum(0) * x), batch_argnums=(1, 2))(
        TABLE, tokens, x
    )
    norm = np.linalg.norm(np.asarray(total, np.float64))
    assert norm == pytest.approx(0.5, rel=2e-6)


def test_no_row_is_formed():
    """That is what a bag is for: the step needs hardly more than one without privacy."""
    table, tokens = jnp.zeros((500, 64)), jnp.zeros((64, 128), jnp.int32)

    gradient = jax.grad(lambda p, i: jax.vmap(mean, (None, 0))(p, i).sum())
    plain = temporary_bytes(gradient, table, tokens)
    private = temporary_bytes(clipped(mean).fast_fun, table, tokens)
    assert private <= 1.25 * plain
