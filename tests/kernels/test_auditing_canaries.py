"""Canaries: what they are, where they go, and that training on them shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpkernels import clipped_grad, gaussian_privatizer
from dpkernels.auditing import (
    CanaryScoreAuditor,
    GradientCanaries,
    insert_canaries,
    mislabelled_canaries,
)

PARAMS = {"b": jnp.ones(3), "w": jnp.full((4, 5), 2.0)}


def loss(params, x):
    return jnp.sum(jnp.tanh(params["w"] @ jnp.ones(5)) * x) + jnp.sum(params["b"])


def test_inserted_canaries_are_those_of_the_coins():
    dataset = {"x": np.zeros((10, 2)), "y": np.zeros(10, np.int64)}
    canaries = {"x": np.ones((50, 2)), "y": np.arange(50)}
    inserted = insert_canaries(dataset, canaries, rng=0)
    np.testing.assert_array_equal(inserted.dataset["y"][10:], np.arange(50)[inserted.is_included])
    assert inserted.dataset["x"].sum() == 2 * inserted.is_included.sum()


def test_coins_are_fair_and_independent():
    canaries = np.zeros(100_000)
    coins = insert_canaries(np.zeros(1), canaries, rng=0).is_included
    assert stats.binomtest(int(coins.sum()), coins.size).pvalue > 1e-6
    alike = coins[1:] == coins[:-1]
    assert stats.binomtest(int(alike.sum()), alike.size).pvalue > 1e-6


def test_coins_of_the_operating_system_differ():
    one, two = (insert_canaries(np.zeros(1), np.zeros(100)).is_included for _ in range(2))
    assert not np.array_equal(one, two)


@pytest.mark.parametrize(
    ("canaries", "message"),
    [
        (np.zeros((3, 4)), "`canaries` must be like the dataset"),
        (np.zeros((3, 2), np.float32), "`canaries` must be like the dataset"),
        ({"x": np.zeros((3, 2))}, "`canaries` must be like the dataset"),
        ((np.zeros((3, 2)), np.zeros(4)), "`canaries` must be arrays with one length"),
        (np.float64(1.0), "`canaries` must be arrays with one length"),
    ],
)
def test_insert_refuses_other_canaries(canaries, message):
    with pytest.raises(ValueError, match=message):
        insert_canaries(np.zeros((10, 2)), canaries)


def test_mislabelled_canaries_are_examples_under_every_wrong_label():
    inputs, labels = np.arange(3000), np.arange(3000) % 4
    copied, wrong = mislabelled_canaries((inputs, labels), 3000, num_classes=4, rng=0)
    assert sorted(copied) == list(range(3000))
    assert wrong.dtype == labels.dtype
    offsets = np.bincount((wrong - labels[copied]) % 4, minlength=4)
    assert offsets[0] == 0
    assert stats.chisquare(offsets[1:]).pvalue > 1e-6


@pytest.mark.parametrize(
    ("labels", "count", "error"),
    [
        (np.zeros(5, int), 6, ValueError),
        (np.full(5, 3), 2, ValueError),
        (np.zeros(5), 2, TypeError),
        (np.zeros(5, int), 0, ValueError),
    ],
)
def test_mislabelled_canaries_refuse(labels, count, error):
    with pytest.raises(error, match="must be"):
        mislabelled_canaries((np.zeros(5), labels), count, num_classes=3)


def test_gradient_canaries_are_orthogonal_and_saturate_clipping():
    canaries = GradientCanaries.draw(PARAMS, 23, rng=0)
    gradient = clipped_grad(canaries.wrap_loss(loss), l2_clip_norm=1.0, keep_batch_dim=False)

    @jax.jit
    @jax.vmap
    def alone(label):
        total = gradient(PARAMS, (jnp.zeros((1, 4)), label[None]))
        return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(total)])

    flat = alone(jnp.asarray(canaries.labels))
    np.testing.assert_allclose(flat @ flat.T, np.eye(23), atol=1e-6)


def test_gradient_canaries_leave_ordinary_examples_alone():
    canaries = GradientCanaries.draw(PARAMS, 5, rng=0)
    x = jnp.arange(4.0)
    wrapped = jax.grad(canaries.wrap_loss(loss))(PARAMS, (x, jnp.int32(-1)))
    jax.tree.map(np.testing.assert_allclose, wrapped, jax.grad(loss)(PARAMS, x))


def test_gradient_canaries_need_a_coordinate_each():
    with pytest.raises(ValueError, match="`num_canaries` must be at most the 23 coordinates"):
        GradientCanaries.draw(PARAMS, 24)


@pytest.mark.parametrize(("noise_multiplier", "is_caught"), [(1.0, False), (0.3, True)])
def test_gradient_canaries_audit_one_run(noise_multiplier, is_caught):
    # One full-batch step, claimed to have a noise multiplier of 1: epsilon 4.38. With 0.3 it is
    # 21, of which a single run of 800 canaries shows more than a quarter.
    params = {"w": jnp.zeros(800)}
    canaries = GradientCanaries.draw(params, 800, rng=0)
    pairs = (np.zeros((800, 1), np.float32), canaries.labels)
    ordinary = (np.zeros((10, 1), np.float32), np.full(10, -1, np.int32))
    inserted = insert_canaries(ordinary, pairs, rng=1)
    wrapped = canaries.wrap_loss(lambda params, x: jnp.sum(params["w"]) * x[0])
    total = jax.jit(clipped_grad(wrapped, l2_clip_norm=1.0, keep_batch_dim=False))
    noise = gaussian_privatizer(stddev=noise_multiplier, prng_key=0)
    summed = total(params, jax.tree.map(jnp.asarray, inserted.dataset))
    scores = canaries.scores(noise.update(summed, noise.init(params))[0])
    auditor = CanaryScoreAuditor(scores[inserted.is_included], scores[~inserted.is_included])
    bound = auditor.epsilon_one_run_fdp(0.05, 1e-5)
    assert bound > 1.0
    assert (bound > 4.38) == is_caught
