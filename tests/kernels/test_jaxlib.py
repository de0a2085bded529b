"""Programs that a released XLA compiled wrongly. Under jaxlib 0.10.2 both numeric tests fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpkernels._compat import refuse_broken_jaxlib


def standardised_conv_loss(weight, x):
    """A 1x1 convolution whose filters are standardised on the fly, on one example."""
    filters = weight.reshape(weight.shape[0], -1)
    mean = filters.mean(axis=1, keepdims=True)
    variance = ((filters - mean) ** 2).mean(axis=1, keepdims=True)
    standard = ((filters - mean) * jax.lax.rsqrt(variance + 1e-6)).reshape(weight.shape)
    y = jax.lax.conv_general_dilated(x, standard, (1, 1), "VALID")
    return jnp.mean(y**2)


@pytest.mark.parametrize("batch", [4, 8])
def test_per_example_gradients_of_a_standardised_convolution(batch):
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(1024, 512, 1, 1)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(batch, 1, 512, 2, 2)), jnp.float32)
    gradient = jax.grad(standardised_conv_loss)
    together = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))(weight, x)
    alone = jax.jit(gradient)
    for found, example in zip(together, x, strict=True):
        expected = np.asarray(alone(weight, example))
        assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("rows", [16_385, 32_769])
def test_sum_of_squares_of_a_matrix_vector_product(rows):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(3, 3)).astype(np.float32)
    vectors = rng.normal(size=(rows, 3)).astype(np.float32)
    squares = jax.jit(jax.vmap(lambda v, m: jnp.sum((m @ v) ** 2), in_axes=(0, None)))
    expected = ((vectors.astype(np.float64) @ matrix.T.astype(np.float64)) ** 2).sum(axis=1)
    np.testing.assert_allclose(squares(vectors, matrix), expected, rtol=1e-4)


def test_refuses_the_broken_jaxlib():
    with pytest.raises(ImportError, match=r"must not be 0\.10\.2"):
        refuse_broken_jaxlib("0.10.2")


def test_accepts_the_installed_jaxlib():
    refuse_broken_jaxlib()
