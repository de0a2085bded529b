"""The audit of a plan: its parts, and that it runs what the plan says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpkernels import clipped_grad
from dpkernels.auditing import audit_plan
from dpkernels.auditing.likelihood import LikelihoodRatio, precision_of
from dpkernels.auditing.plan_runs import Neighbors, PlanRunner, draw_batches, participations
from dpkernels.batch_selection import BatchSelectionStrategy
from dpkernels.execution_plan import (
    DPExecutionPlan,
    DPSGDConfig,
    NonPrivateConfig,
    PerformanceFlags,
)


def twin_of(plan, **parts):
    """A plan whose config made other parts than it says."""
    names = ("clipped_grad", "batch_selection_strategy", "noise_addition_transform")
    own = {name: getattr(plan, name) for name in names}
    return DPExecutionPlan.made_by(plan.config, **(own | parts))


CONFIG = DPSGDConfig(iterations=3, sampling_prob=0.5, noise_multiplier=1.0, l2_clip_norm=0.25)
PLAN = CONFIG.make()
SILENT = twin_of(PLAN, noise_addition_transform=optax.identity())


def test_likelihood_of_poisson_is_that_of_the_mixtures():
    rng = np.random.default_rng(0)
    patterns = np.array(np.meshgrid([0, 1], [0, 1])).reshape(2, -1).T  # every one as likely
    statistic = LikelihoodRatio(patterns, np.eye(2) / 4, cycle_length=1)
    released = rng.normal(size=(5, 2))
    expected = np.log(0.5 + 0.5 * np.exp((1.5 * released - 1.5**2 / 2) / 4)).sum(axis=1)
    np.testing.assert_allclose(statistic.log_likelihood(released, 1.5), expected)


def test_likelihood_of_turns_is_that_of_each_turn():
    # Turns of two: steps 0 and 2, or 1 and 3, always.
    patterns = np.array([[1, 0, 1, 0], [0, 1, 0, 1]])
    statistic = LikelihoodRatio(patterns, np.eye(4), cycle_length=2)
    released = np.array([[1.0, -1.0, 2.0, 0.5]])
    expected = np.log((np.exp(1 + 2 - 1) + np.exp(-1 + 0.5 - 1)) / 2)
    np.testing.assert_allclose(statistic.log_likelihood(released, 1.0), [expected])


def test_precision_undoes_correlation():
    rng = np.random.default_rng(0)
    mixing = np.array([[1.0, 0.0], [-0.8, 1.0]])
    samples = rng.normal(size=(200_000, 2)) @ mixing.T
    expected = np.linalg.inv(mixing @ mixing.T)
    np.testing.assert_allclose(precision_of(samples, 1.0), expected, rtol=0.03)


def test_precision_without_noise_is_finite():
    assert np.isfinite(precision_of(np.zeros((10, 3)), 1.0)).all()


def test_participations_are_counted():
    drawn = [[np.array([3, 1, 3]), np.array([], int)], [np.array([0]), np.array([3])]]
    np.testing.assert_array_equal(participations(drawn, 3), [[2, 0], [0, 1]])


@pytest.mark.parametrize(
    ("other", "with_canary", "expected"),
    [(None, True, 7), (None, False, 6), (0.0, False, 7), (-1.0, False, 7)],
)
def test_neighbors_have_the_size_of_their_relation(other, with_canary, expected):
    assert Neighbors(7, 0.0, other).size(with_canary) == expected


def test_runner_releases_the_clipped_sums():
    runner = PlanRunner.make(SILENT, 1.0, 1e4)
    assert runner.reach == pytest.approx(0.25)
    rng = np.random.default_rng(0)
    drawn = draw_batches(SILENT.batch_selection_strategy, 6, 4, rng)
    multiples = np.array([0, 0, -1, 0, 0, 1], np.float32)
    along, rest = runner.release(drawn, multiples, rng)
    expected = 0.25 * (participations(drawn, 5) - participations(drawn, 2))
    np.testing.assert_allclose(along, expected, atol=1e-6)
    assert not rest.any()


def test_runner_of_layers_reaches_the_whole_bound():
    config = dataclasses.replace(CONFIG, l2_clip_norm={"a": 3.0, "b": 4.0}, normalize_by=10.0)
    assert PlanRunner.make(config.make(), config.l2_clip_norm, 1e4).reach == pytest.approx(0.5)


def test_runs_have_noise_of_the_plan_each_its_own():
    plan = CONFIG.make(PerformanceFlags(noise_seed=5))
    runner = PlanRunner.make(plan, 1.0, 1e4)
    drawn = draw_batches(plan.batch_selection_strategy, 4, 1000, np.random.default_rng(0))
    multiples = np.zeros(4, np.float32)
    along, rest = runner.release(drawn, multiples, np.random.default_rng(1))
    again, _ = runner.release(drawn, multiples, np.random.default_rng(1))
    np.testing.assert_array_equal(along, again)
    values = np.concatenate([along.ravel(), rest.ravel()])
    assert np.unique(values).size > 0.99 * values.size
    assert np.std(values) == pytest.approx(0.25, rel=0.03)  # 24000 draws: 6 sigma


def test_noise_without_a_key_finds_its_own_randomness():
    draws = iter(range(100))

    def init(params):
        del params
        return jnp.float32(next(draws))

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda x: x + state, updates), state

    noise = optax.GradientTransformation(init, update)
    plan = twin_of(PLAN, noise_addition_transform=noise)
    rng = np.random.default_rng(0)
    drawn = draw_batches(plan.batch_selection_strategy, 4, 5, rng)
    along, _ = PlanRunner.make(plan, 1.0, 1e4).release(drawn, np.zeros(4, np.float32), rng)
    np.testing.assert_allclose(along, np.arange(5.0)[:, None] + np.zeros(3))


def test_report_says_what_was_found():
    report = audit_plan(SILENT, delta=0.1, num_trials=50, rng=3)
    assert report.in_scores.shape == report.out_scores.shape == (50,)
    assert report.epsilon_claimed == SILENT.epsilon(0.1)
    assert not dataclasses.replace(report, epsilon_lower_bound=100.0).holds
    assert dataclasses.replace(report, epsilon_lower_bound=0.1).holds


def test_claim_can_be_given():
    report = audit_plan(SILENT, delta=0.1, num_trials=200, rng=0, epsilon_claimed=1e-3)
    assert report.epsilon_claimed == 1e-3
    assert not report.holds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": 0.0}, "`delta` must be in"),
        ({"num_trials": 1}, "`num_trials` must be at least 2"),
        ({"num_examples": 1}, "`num_examples` must be at least 2"),
        ({"background": 2.0}, "`background` must be in"),
        ({"canary_norm": 0.0}, "`canary_norm` must be positive"),
        ({"epsilon_claimed": -1.0}, "`epsilon_claimed` must not be negative"),
        ({"epsilon_claimed": float("nan")}, "`epsilon_claimed` must not be negative"),
        ({"significance": 0.6}, "`significance` must be in"),
    ],
)
def test_audit_refuses_an_argument(options, message):
    with pytest.raises(ValueError, match=message):
        audit_plan(PLAN, **({"delta": 0.1} | options))


def test_audit_refuses_a_canary_that_no_sum_shows():
    def dropping(*args, **options):
        return clipped_grad(*args, l2_clip_norm=1.0, dtype=jnp.float16, **options)

    plan = twin_of(PLAN, clipped_grad=dropping)
    with pytest.raises(ValueError, match=r"`plan.clipped_grad` must let a canary through"):
        audit_plan(plan, delta=0.1, canary_norm=1e6)


def test_audit_refuses_a_canary_that_clipping_does_not_reach():
    plan = dataclasses.replace(CONFIG, l2_clip_norm=1e6).make()
    with pytest.raises(ValueError, match="`canary_norm` must be above the clip norms"):
        audit_plan(plan, delta=0.1)


def test_audit_refuses_a_plan_without_a_claim():
    plan = NonPrivateConfig(iterations=2, batch_size=3).make()
    with pytest.raises(ValueError, match=r"epsilon|supported|private"):
        audit_plan(plan, delta=0.1)


def test_audit_refuses_batches_of_users():
    @dataclasses.dataclass(frozen=True)
    class Users(BatchSelectionStrategy):
        iterations: int = 3

        def batch_iterator(self, num_examples, rng=None):
            yield from [np.zeros((2, 2), int)] * 3

    plan = twin_of(PLAN, batch_selection_strategy=Users())
    with pytest.raises(NotImplementedError, match="batches of users"):
        audit_plan(plan, delta=0.1)
