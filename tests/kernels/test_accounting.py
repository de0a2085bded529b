"""The builders of events: what they say, and what they refuse."""

import math

import dp_accounting
import pytest

from dpkernels import accounting

INFINITE_NAN_NEGATIVE = [-1.0, math.nan, math.inf]


def test_dpsgd_event_is_composed_poisson_sampled_gaussian():
    event = accounting.dpsgd_event(1.5, 7, sampling_prob=0.25)
    step = dp_accounting.PoissonSampledDpEvent(0.25, dp_accounting.GaussianDpEvent(1.5))
    assert event == dp_accounting.SelfComposedDpEvent(step, 7)


def test_dpsgd_event_by_zcdp_has_the_gaussians_rho():
    event = accounting.dpsgd_event(2.0, 3, sampling_prob=1.0, use_zcdp=True)
    assert event.event.event == dp_accounting.ZCDpEvent(0.125)
    silent = accounting.dpsgd_event(0.0, 3, sampling_prob=1.0, use_zcdp=True)
    assert silent.event.event == dp_accounting.ZCDpEvent(math.inf)


@pytest.mark.parametrize(
    ("replace", "kind"),
    [
        (False, dp_accounting.SampledWithoutReplacementDpEvent),
        (True, dp_accounting.SampledWithReplacementDpEvent),
    ],
)
def test_fixed_dpsgd_event_says_whether_examples_repeat(replace, kind):
    event = accounting.fixed_dpsgd_event(1.5, 7, dataset_size=100, batch_size=10, replace=replace)
    assert event == dp_accounting.SelfComposedDpEvent(
        kind(100, 10, dp_accounting.GaussianDpEvent(1.5)), 7
    )


def test_fixed_dpsgd_event_refuses_a_batch_larger_than_the_dataset():
    with pytest.raises(ValueError, match="`batch_size` must be at most `dataset_size`"):
        accounting.fixed_dpsgd_event(1.0, 1, dataset_size=9, batch_size=10)
    with pytest.raises(ValueError, match="`batch_size` must be at most `dataset_size`"):
        accounting.fixed_dpsgd_event(1.0, 1, dataset_size=0, batch_size=10, replace=True)
    accounting.fixed_dpsgd_event(1.0, 1, dataset_size=9, batch_size=10, replace=True)


def test_truncated_dpsgd_event_holds_its_numbers():
    event = accounting.truncated_dpsgd_event(
        1.5, 7, sampling_prob=0.25, num_examples=40, truncated_batch_size=12
    )
    step = dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent(40, 0.25, 12, 1.5)
    assert event == dp_accounting.SelfComposedDpEvent(step, 7)


@pytest.mark.parametrize(("iterations", "rounds"), [(0, 0), (1, 1), (3, 1), (4, 2), (9, 3)])
def test_bandmf_events_count_each_begun_round(iterations, rounds):
    event = accounting.amplified_bandmf_event(1.0, iterations, num_bands=3, sampling_prob=0.5)
    assert event.count == rounds
    event = accounting.truncated_amplified_bandmf_event(
        1.0,
        iterations,
        num_bands=3,
        sampling_prob=0.5,
        largest_group_size=10,
        truncated_batch_size=6,
    )
    assert event.count == rounds
    assert event.event.dataset_size == 10


@pytest.mark.parametrize("noise_multiplier", INFINITE_NAN_NEGATIVE)
def test_events_refuse_noise_that_is_none(noise_multiplier):
    with pytest.raises(ValueError, match="`noise_multiplier` must be"):
        accounting.dpsgd_event(noise_multiplier, 1, sampling_prob=0.1)
    with pytest.raises(ValueError, match="`noise_multiplier` must be"):
        accounting.truncated_dpsgd_event(
            noise_multiplier, 1, sampling_prob=0.1, num_examples=9, truncated_batch_size=3
        )


@pytest.mark.parametrize("sampling_prob", [-0.1, 1.1, math.nan])
def test_events_refuse_what_is_no_probability(sampling_prob):
    with pytest.raises(ValueError, match="`sampling_prob` must be"):
        accounting.dpsgd_event(1.0, 1, sampling_prob=sampling_prob)


def test_events_refuse_fewer_than_no_iterations():
    with pytest.raises(ValueError, match="`iterations` must be at least 0"):
        accounting.dpsgd_event(1.0, -1, sampling_prob=0.1)
    with pytest.raises(ValueError, match="`num_bands` must be at least 1"):
        accounting.amplified_bandmf_event(1.0, 1, num_bands=0, sampling_prob=0.1)


def test_no_sampling_is_allowed_and_spends_nothing():
    event = accounting.dpsgd_event(1.0, 5, sampling_prob=0)
    assert event.event.sampling_probability == 0.0
