"""The noise: its law, that it never repeats, and that it looks at nothing but its key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from scipy import stats

from dpkernels import gaussian_privatizer
from dpkernels.gaussian import _cosine, _radius, random_words, standard_normal
from dpkernels.noise_addition import make_key

SIZE = 100_000


def draw(stddev, *, seed=0, steps=1, tree=None):
    noise = gaussian_privatizer(stddev=stddev, prng_key=seed)
    zeros = {"w": jnp.zeros(SIZE)} if tree is None else tree
    state, draws = noise.init(zeros), []
    for _ in range(steps):
        noised, state = noise.update(zeros, state)
        draws.append(noised)
    return draws


@pytest.mark.parametrize("stddev", [0.3, 1.0, 20.0])
def test_noise_is_gaussian_at_the_stated_scale(stddev):
    (noised,) = draw(stddev)
    assert stats.kstest(noised["w"], stats.norm(scale=stddev).cdf).pvalue > 1e-3


@pytest.mark.parametrize("factor", [2 / 3, 3 / 2])
def test_noise_at_another_scale_is_told_apart(factor):
    (noised,) = draw(1.0)
    assert stats.kstest(noised["w"], stats.norm(scale=factor).cdf).pvalue < 1e-9


def test_noise_is_independent_between_steps_leaves_and_coordinates():
    tree = {"a": jnp.zeros(SIZE), "b": jnp.zeros(SIZE)}
    first, second = draw(1.0, steps=2, tree=tree)
    streams = [first["a"], first["b"], second["a"], second["b"], np.roll(first["a"], 1)]
    correlations = np.corrcoef(np.stack(streams)) - np.eye(5)
    assert np.abs(correlations).max() < 4.5 / SIZE**0.5  # 20 pairs at 4.5 sigma: 7e-5.


def test_noise_never_repeats():
    words = np.concatenate([np.asarray(d["w"]) for d in draw(1.0, steps=3)])
    # Two draws share a float32 now and then, but never an aligned run of them.
    assert len({run.tobytes() for run in words.reshape(-1, 4)}) == len(words) // 4


def test_noise_depends_on_key_and_step_alone():
    noise = gaussian_privatizer(stddev=1.0, prng_key=5)
    state = noise.init(None)
    small, _ = noise.update({"w": jnp.zeros(4)}, state)
    large, _ = noise.update({"w": jnp.full(4, 1024.0)}, state)
    np.testing.assert_allclose(large["w"] - 1024.0, small["w"], atol=1e-4)


def test_noise_of_the_operating_system_differs_each_time():
    (one,), (two,) = draw(1.0, seed=None), draw(1.0, seed=None)
    assert not np.array_equal(one["w"], two["w"])


def test_noise_continues_from_its_state():
    noise = gaussian_privatizer(stddev=1.0, prng_key=0)
    zeros = {"w": jnp.zeros(8)}
    _, state = noise.update(zeros, noise.init(zeros))
    resumed, _ = noise.update(zeros, state)
    *_, expected = draw(1.0, steps=2, tree=zeros)
    np.testing.assert_array_equal(resumed["w"], expected["w"])


def test_noise_keeps_the_dtype_and_draws_in_float32():
    tree = {"w": jnp.zeros(SIZE, jnp.bfloat16)}
    (noised,) = draw(1.0, tree=tree)
    assert noised["w"].dtype == jnp.bfloat16
    (wide,) = draw(1.0)
    np.testing.assert_array_equal(noised["w"], wide["w"].astype(jnp.bfloat16))


def test_noise_in_float64_is_drawn_in_float64():
    with jax.enable_x64(True):
        (noised,) = draw(1.0, tree={"w": jnp.zeros(SIZE, jnp.float64)})
        narrow = noised["w"].astype(jnp.float32).astype(jnp.float64)
        assert np.mean(np.asarray(narrow == noised["w"])) < 0.01
        assert stats.kstest(noised["w"], stats.norm.cdf).pvalue > 1e-3


def test_zero_noise_changes_nothing():
    noise = gaussian_privatizer(stddev=0.0, prng_key=0)
    sums = {"w": jnp.arange(4.0)}
    noised, _ = noise.update(sums, noise.init(sums))
    np.testing.assert_array_equal(noised["w"], sums["w"])


@pytest.mark.parametrize("stddev", [-1.0, float("nan"), float("inf")])
def test_gaussian_privatizer_refuses_a_scale(stddev):
    with pytest.raises(ValueError, match="`stddev` must be non-negative and finite"):
        gaussian_privatizer(stddev=stddev)


def test_gaussian_privatizer_refuses_half_precision_noise():
    with pytest.raises(TypeError, match="`dtype` must be float32 or float64"):
        gaussian_privatizer(stddev=1.0, dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, ValueError), (2**64, ValueError), (1.5, TypeError)]
)
def test_make_key_refuses_a_seed(seed, error):
    with pytest.raises(error, match="`seed` must be"):
        make_key(seed)


def test_noise_on_integers_is_refused():
    noise = gaussian_privatizer(stddev=1.0, prng_key=0)
    with pytest.raises(NotImplementedError, match="need discrete Gaussian noise"):
        noise.update({"w": jnp.zeros(3, jnp.int32)}, noise.init(None))


def test_make_key_uses_all_64_bits():
    low, high = make_key(7), make_key(7 + 2**63)
    assert not np.array_equal(jax.random.key_data(low), jax.random.key_data(high))


def test_random_words_are_threefry():
    key, count = make_key(2**40 + 3), 1001
    x, y = random_words(key, count)
    counters = jnp.concatenate([jnp.zeros(count, jnp.uint32), jnp.arange(count, dtype=jnp.uint32)])
    expected = threefry_2x32(jax.random.key_data(key), counters)
    np.testing.assert_array_equal(jnp.concatenate([x, y]), expected)


def test_standard_normal_has_moments_and_tails():
    draws = np.asarray(jax.jit(standard_normal, static_argnums=1)(make_key(0), (2_000_000,)))
    draws = draws.astype(np.float64)
    assert stats.kstest(draws, "norm").pvalue > 1e-3
    for bound in (3.0, 4.0, 4.75):
        expected = 2 * stats.norm.sf(bound) * draws.size
        beyond = np.count_nonzero(np.abs(draws) > bound)
        assert abs(beyond - expected) < 4.5 * expected**0.5


def test_standard_normal_reaches_further_than_23_bits():
    # The words that make the longest radius: 0 of 2**32, where 23 bits would end at 5.42.
    assert float(_radius(jnp.zeros(1, jnp.uint32))[0]) == pytest.approx(6.764, abs=1e-3)


def test_standard_normal_is_finite_for_every_extreme_word():
    words = jnp.array([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], jnp.uint32)
    assert jnp.isfinite(_radius(words)).all()
    assert (jnp.abs(_cosine(words)) <= 1 + 1e-7).all()


def test_standard_normal_refuses_another_generator():
    with pytest.raises(TypeError, match="threefry2x32"):
        standard_normal(jax.random.key(0, impl="rbg"), (3,))
