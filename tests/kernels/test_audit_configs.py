"""End to end: every config keeps its claim against an attack, and broken twins do not.

Each audit is at a significance of 1e-6 and a delta at which a few hundred runs say something: a
twin with half the noise is caught wherever the accounting is tight.
"""

import dataclasses

import dp_accounting
import numpy as np
import optax
import pytest

from dpkernels import accounting, clipped_grad
from dpkernels.auditing import audit_plan
from dpkernels.batch_selection import BatchSelectionStrategy, FixedBatchSampling
from dpkernels.execution_plan import BandMFConfig, DPExecutionPlan, DPSGDConfig

Relation = dp_accounting.NeighboringRelation

POISSON = DPSGDConfig(iterations=6, sampling_prob=0.6, noise_multiplier=2.0)
FULL = DPSGDConfig(iterations=3, sampling_prob=1.0, noise_multiplier=2.0)
FIXED = DPSGDConfig(iterations=3, batch_size=12, num_examples=12, noise_multiplier=2.0)
BANDED = BandMFConfig(
    iterations=9, expected_participations=3.0, strategy=(1.0, 0.5, 0.25), noise_multiplier=2.0
)
FIRST = {"poisson": POISSON, "banded": BANDED}
MORE = {
    "fixed": FIXED,
    "poisson zero-out": dataclasses.replace(POISSON, neighboring_relation=Relation.REPLACE_SPECIAL),
    "poisson replace-one": dataclasses.replace(POISSON, neighboring_relation=Relation.REPLACE_ONE),
    "fixed small": dataclasses.replace(FIXED, batch_size=4, noise_multiplier=1.0),
    "truncated zero-out": dataclasses.replace(
        POISSON,
        num_examples=12,
        truncated_batch_size=8,
        neighboring_relation=Relation.REPLACE_SPECIAL,
    ),
    "truncated replace-one": dataclasses.replace(
        POISSON,
        num_examples=12,
        truncated_batch_size=8,
        neighboring_relation=Relation.REPLACE_ONE,
    ),
    "per layer": dataclasses.replace(
        FULL, l2_clip_norm={"a": 1.0, "b": {"c": 2.0}}, normalize_by=10.0
    ),
    "per layer rescaled": dataclasses.replace(
        FULL, l2_clip_norm={"a": 1.0, "b": 2.0}, rescale_to_unit_norm=True
    ),
    "rescaled": dataclasses.replace(FULL, l2_clip_norm=0.1, rescale_to_unit_norm=True),
    "banded zero-out": dataclasses.replace(BANDED, num_examples=12),
    "banded normalized": dataclasses.replace(
        BANDED, num_examples=12, column_normalize=True, strategy=(0.5, 0.25)
    ),
    "banded truncated": dataclasses.replace(
        BANDED, expected_participations=1.5, num_examples=24, truncated_batch_size=6
    ),
    "banded unscaled": dataclasses.replace(BANDED, strategy=(0.5,), column_normalize=True),
}
# Where the accounting is an upper bound that is far from tight, half the noise stays below it.
LOOSE = {"fixed small", "truncated zero-out", "truncated replace-one", "banded truncated"}


def audit(plan, **options):
    return audit_plan(plan, **({"delta": 0.05, "num_trials": 2000, "rng": 0} | options))


def twin_of(plan, **parts):
    """A plan whose config made other parts than it says."""
    names = ("clipped_grad", "batch_selection_strategy", "noise_addition_transform")
    own = {name: getattr(plan, name) for name in names}
    return DPExecutionPlan.made_by(plan.config, **(own | parts))


def with_noise_of(plan, config):
    return twin_of(plan, noise_addition_transform=config.make().noise_addition_transform)


def with_less_noise(config, factor=0.5):
    less = dataclasses.replace(config, noise_multiplier=factor * config.noise_multiplier)
    return with_noise_of(config.make(), less)


def as_poisson(strategy, *, sampling_prob, noise_multiplier, iterations):
    """A plan whose batches are drawn in another way than is accounted."""
    honest = DPSGDConfig(
        iterations=iterations, sampling_prob=sampling_prob, noise_multiplier=noise_multiplier
    ).make()
    return DPExecutionPlan(
        clipped_grad=honest.clipped_grad,
        batch_selection_strategy=strategy,
        noise_addition_transform=honest.noise_addition_transform,
        dp_event=accounting.dpsgd_event(noise_multiplier, iterations, sampling_prob=sampling_prob),
        neighboring_relation=Relation.ADD_OR_REMOVE_ONE,
    )


@dataclasses.dataclass(frozen=True)
class RoundRobin(BatchSelectionStrategy):
    """Batches in the order of the dataset, as a loader without a sampler has them."""

    iterations: int
    batch_size: int

    def batch_iterator(self, num_examples, rng=None):
        del rng
        for step in range(self.iterations):
            start = step * self.batch_size
            yield np.arange(start, start + self.batch_size) % num_examples


@pytest.mark.parametrize("name", FIRST)
def test_config_holds(name):
    report = audit(FIRST[name].make(), significance=1e-6)
    assert report.holds
    assert report.epsilon_lower_bound > 0.1 * report.epsilon_claimed


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_every_config_holds(name):
    report = audit(MORE[name].make(), significance=1e-6, num_trials=5000)
    assert report.holds
    assert report.epsilon_lower_bound > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST | MORE)
def test_every_config_holds_at_a_small_delta(name):
    report = audit((FIRST | MORE)[name].make(), significance=1e-6, delta=1e-3, num_trials=5000)
    assert report.holds


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FIRST | MORE if name not in LOOSE])
def test_half_the_noise_is_caught_for_every_config(name):
    report = audit(with_less_noise((FIRST | MORE)[name]), significance=1e-6, num_trials=5000)
    assert not report.holds


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LOOSE))
def test_a_tenth_of_the_noise_is_caught_where_accounting_is_loose(name):
    report = audit(with_less_noise(MORE[name], 0.1), significance=1e-6, num_trials=5000)
    assert not report.holds


def test_half_the_noise_is_caught():
    assert not audit(with_less_noise(POISSON), significance=1e-6).holds


def test_no_clipping_is_caught():
    def unclipped(*args, **options):
        honest = clipped_grad(*args, l2_clip_norm=1e9, **options)
        return dataclasses.replace(honest, l2_norm_bound=1.0)  # what it says it does

    twin = twin_of(POISSON.make(), clipped_grad=unclipped)
    assert not audit(twin, significance=1e-6, num_trials=200).holds


def test_no_clipping_that_says_so_is_refused():
    def unclipped(*args, **options):
        return clipped_grad(*args, l2_clip_norm=float("inf"), **options)

    twin = twin_of(POISSON.make(), clipped_grad=unclipped)
    with pytest.raises(ValueError, match="without clipping no number is enough"):
        audit(twin, num_trials=2)


def test_batches_in_order_accounted_as_poisson_are_caught():
    # Once for certain instead of 10 times with probability 1/10: epsilon 1.5 for a claim of 0.6.
    twin = as_poisson(
        RoundRobin(iterations=10, batch_size=2),
        sampling_prob=0.1,
        noise_multiplier=1.0,
        iterations=10,
    )
    assert not audit(twin, significance=1e-6).holds


@pytest.mark.slow
def test_fixed_batches_accounted_as_poisson_are_caught():
    # The canary takes another's place, so the sum moves by twice the clip norm.
    twin = as_poisson(
        FixedBatchSampling(batch_size=10, iterations=4),
        sampling_prob=0.5,
        noise_multiplier=1.0,
        iterations=4,
    )
    assert not audit(twin, significance=1e-6, num_trials=5000).holds


@pytest.mark.slow
def test_noise_that_repeats_is_caught():
    # The same draw at each step: differences of two releases have no noise.
    honest = POISSON.make().noise_addition_transform

    def update(updates, state, params=None):
        return honest.update(updates, state, params)[0], state

    twin = twin_of(
        POISSON.make(),
        noise_addition_transform=optax.GradientTransformation(honest.init, update),
    )
    assert not audit(twin, significance=1e-6).holds


@pytest.mark.slow
def test_no_noise_is_caught():
    twin = twin_of(FULL.make(), noise_addition_transform=optax.identity())
    assert not audit(twin, significance=1e-6).holds


@pytest.mark.slow
def test_noise_of_unscaled_strategy_is_caught():
    # JAX Privacy 2.0.0 scales noise by the norm of the strategy, 1/2, and normalises columns too.
    config = MORE["banded unscaled"]
    assert not audit(with_less_noise(config), significance=1e-6).holds


@pytest.mark.slow
def test_replace_one_with_the_noise_of_zero_out_is_caught():
    config = MORE["poisson replace-one"]
    twin = with_noise_of(config.make(), POISSON)
    assert not audit(twin, significance=1e-6).holds


@pytest.mark.slow
def test_more_epochs_of_a_band_than_accounted_are_caught():
    # Every step draws from all examples, where a turn every third was accounted.
    honest = BANDED.make()
    every_step = dataclasses.replace(honest.batch_selection_strategy, cycle_length=1)
    twin = twin_of(honest, batch_selection_strategy=every_step)
    assert not audit(twin, significance=1e-6, num_trials=5000).holds
