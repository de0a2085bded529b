"""What events spend: closed forms, datasets that attain it, and what is refused."""

import itertools
import math

import dp_accounting
import hypothesis
import numpy as np
import pytest
from dp_accounting import NeighboringRelation
from dp_accounting import dp_event as events
from hypothesis import strategies as st
from scipy import optimize, stats

from dpkernels import composition
from dpkernels.composition import delta_of_event, epsilon_of_event

ADD, REPLACE, SPECIAL = (
    NeighboringRelation.ADD_OR_REMOVE_ONE,
    NeighboringRelation.REPLACE_ONE,
    NeighboringRelation.REPLACE_SPECIAL,
)


def gaussian(noise_multiplier):
    return events.GaussianDpEvent(noise_multiplier)


def poisson(sampling_prob, noise_multiplier):
    return events.PoissonSampledDpEvent(sampling_prob, gaussian(noise_multiplier))


def fixed(size, batch_size, noise_multiplier):
    inner = gaussian(noise_multiplier)
    return events.SampledWithoutReplacementDpEvent(size, batch_size, inner)


def truncated(size, sampling_prob, batch_size, noise_multiplier):
    return events.TruncatedSubsampledGaussianDpEvent(
        size, sampling_prob, batch_size, noise_multiplier
    )


def times(count, event):
    return events.SelfComposedDpEvent(event, count)


COARSE = composition.pld_accountant(1e-3)  # quick, and still tight where epsilon is about 1
MIXTURE = events.MixtureOfGaussiansDpEvent(4.0, [0.0, 1.0, 2.0], [0.9, 0.09, 0.01])


def gaussian_delta(sigma, epsilon):
    """Balle and Wang 2018, Theorem 8."""
    upper = stats.norm.logcdf(0.5 / sigma - epsilon * sigma)
    lower = epsilon + stats.norm.logcdf(-0.5 / sigma - epsilon * sigma)
    return -math.exp(upper) * math.expm1(lower - upper)


def gaussian_epsilon(sigma, delta):
    return optimize.brentq(lambda e: gaussian_delta(sigma, e) - delta, 0, 1e3, xtol=1e-13)


# -- densities of what is released, on a grid of outputs ------------------------------------

STEP = 0.02
ERROR = 2e-5  # of the quadrature
OUTPUTS = np.arange(-7, 7, STEP)


def density(*means_and_weights):
    """The density of a mixture of unit Gaussians."""
    return sum(weight * stats.norm.pdf(OUTPUTS - mean) for mean, weight in means_and_weights)


def divergence(epsilon, *pairs):
    """The delta between two products of densities, by quadrature."""
    ps, qs = (np.ones(()) for _ in range(2))
    for p, q in pairs:
        ps, qs = np.multiply.outer(ps, p), np.multiply.outer(qs, q)
    return float(np.maximum(ps - math.exp(epsilon) * qs, 0).sum()) * STEP ** len(pairs)


def fixed_pair(sampled, others):
    """One release of a batch without replacement; one example is 1 or -1, all others `others`.

    Constants that both neighbours share are taken off.
    """
    return tuple(density((0.0, 1 - sampled), (x - others, sampled)) for x in (1.0, -1.0))


# -- conventions ----------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.6, 3.0, 50.0])
@pytest.mark.parametrize(("relation", "shift"), [(ADD, 1), (SPECIAL, 1), (REPLACE, 2)])
def test_epsilon_pld_reads_noise_over_the_clip_norm(sigma, relation, shift):
    computed = epsilon_of_event(gaussian(sigma), 1e-6, neighboring_relation=relation)
    assert computed == pytest.approx(gaussian_epsilon(sigma / shift, 1e-6), rel=1e-8)


@pytest.mark.parametrize("relation", [ADD, SPECIAL, REPLACE])
def test_epsilon_rdp_reads_noise_over_the_distance_of_neighbours(relation):
    computed = epsilon_of_event(
        gaussian(2.0), 1e-6, accountant="rdp", neighboring_relation=relation
    )
    # Mironov 2017, Corollary 3, and Canonne et al. 2020, Proposition 12.
    a = np.linspace(2, 40, 100_000)
    exact = (a / 8 + np.log1p(-1 / a) - np.log(1e-6 * a) / (a - 1)).min()
    assert exact <= computed <= exact * 1.01
    assert computed >= gaussian_epsilon(2.0, 1e-6)


def test_an_event_written_for_pld_would_be_understated_by_rdp_under_replace_one():
    # Noise of standard deviation 4 C: neighbouring sums differ by up to 2 C.
    truth = gaussian_epsilon(4.0 / 2, 1e-5)
    pld, rdp, rdp_halved = (
        epsilon_of_event(gaussian(nm), 1e-5, accountant=name, neighboring_relation=REPLACE)
        for nm, name in [(4.0, "pld"), (4.0, "rdp"), (2.0, "rdp")]
    )
    assert rdp < truth <= pld <= rdp_halved


# -- values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "delta", "accountant", "relation", "expected"),
    [
        (times(512, poisson(0.1, 3.0)), 1e-6, "pld", ADD, 3.7697),
        (times(512, poisson(0.1, 3.0)), 1e-6, "rdp", SPECIAL, 4.0510),
        (times(10_000, poisson(1024 / 50_000, 4.0)), 1e-5, "pld", REPLACE, 4.4975),
        (times(10_000, truncated(50_000, 1024 / 50_000, 1056, 4.0)), 1e-5, "pld", ADD, 4.0691),
        (times(10_000, fixed(50_000, 1024, 4.0)), 1e-5, "rdp", REPLACE, 4.98495),
    ],
)
def test_epsilon_golden_values(event, delta, accountant, relation, expected):
    computed = epsilon_of_event(event, delta, accountant=accountant, neighboring_relation=relation)
    assert computed == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    ("event", "relation"),
    [
        (times(3, MIXTURE), ADD),
        (times(20, truncated(1000, 0.1, 110, 2.0)), REPLACE),
        (times(20, events.LaplaceDpEvent(8.0)), ADD),
        (times(20, events.PoissonSampledDpEvent(0.2, events.LaplaceDpEvent(4.0))), SPECIAL),
        (
            events.ComposedDpEvent([poisson(0.1, 2.0), times(5, events.LaplaceDpEvent(8.0))]),
            SPECIAL,
        ),
    ],
)
def test_epsilon_pld_agrees_with_the_accountant_of_dp_accounting(event, relation):
    expected = dp_accounting.pld.PLDAccountant(relation, 1e-3).compose(event).get_epsilon(1e-6)
    computed = epsilon_of_event(event, 1e-6, accountant=COARSE, neighboring_relation=relation)
    assert computed == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("event", "relation"),
    [
        (events.ZCDpEvent(0.01), ADD),
        (events.LaplaceDpEvent(8.0), REPLACE),
        (events.SingleEpochTreeAggregationDpEvent(4.0, [7, 8]), SPECIAL),
        (events.RepeatAndSelectDpEvent(times(3, gaussian(9.0)), 2.0, 1.0), ADD),
        (events.RandomizedResponseDpEvent(0.5, 4), REPLACE),
    ],
)
def test_epsilon_rdp_agrees_with_the_accountant_of_dp_accounting(event, relation):
    accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=relation)
    expected = accountant.compose(event, 3).get_epsilon(1e-6)
    computed = epsilon_of_event(
        times(3, event), 1e-6, accountant="rdp", neighboring_relation=relation
    )
    assert expected <= computed == pytest.approx(expected, rel=1e-6)


# -- never below what datasets spend --------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("sampled", [0.1, 0.9])
def test_delta_of_poisson_under_replace_one_is_that_of_opposite_examples(sampled, epsilon):
    event = poisson(sampled, 1.0)
    computed = delta_of_event(event, epsilon, accountant=COARSE, neighboring_relation=REPLACE)

    def spent(x, other):
        pair = (density((0.0, 1 - sampled), (mean, sampled)) for mean in (x, other))
        return divergence(epsilon, tuple(pair))

    worst = spent(1.0, -1.0)
    assert worst <= computed + ERROR
    assert computed <= worst * 1.001 + ERROR
    for x, other in itertools.product([-1.0, -0.4, 0.0, 0.7, 1.0], repeat=2):
        assert spent(x, other) <= computed + ERROR


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("sampled", [0.1, 0.5, 1.0])
def test_delta_of_one_fixed_batch_is_that_of_the_worst_dataset(sampled, epsilon):
    event = fixed(10, round(10 * sampled), 1.0)
    computed = delta_of_event(event, epsilon, accountant=COARSE, neighboring_relation=REPLACE)
    worst = divergence(epsilon, fixed_pair(sampled, -1.0))
    assert worst - ERROR <= computed <= worst * 1.001 + ERROR


@pytest.mark.parametrize(
    "others", list(itertools.combinations_with_replacement([-1.0, 0.0, 1.0], 2))
)
@pytest.mark.parametrize(("batch_size", "epsilon"), [(9, 0.05), (3, 0.5)])
@pytest.mark.slow
def test_delta_of_two_fixed_batches_covers_datasets_that_change_between(
    others, batch_size, epsilon
):
    spent = divergence(epsilon, *(fixed_pair(batch_size / 10, other) for other in others))
    event = times(2, fixed(10, batch_size, 1.0))
    pld = delta_of_event(event, epsilon, accountant=COARSE, neighboring_relation=REPLACE)
    rdp = delta_of_event(
        times(2, fixed(10, batch_size, 0.5)),
        epsilon,
        accountant="rdp",
        neighboring_relation=REPLACE,
    )
    assert spent <= min(pld, rdp) + ERROR


def test_poisson_samples_with_half_the_noise_do_not_bound_fixed_batches():
    # JAX Privacy 1.0 accounted so for fixed batches. Ten examples on a line, one of which is 1 or
    # -1 and the others 0; two batches of nine. It states 0.5 % less than these datasets spend.
    spent = divergence(0.05, *[fixed_pair(0.9, 0.0)] * 2)
    stated = delta_of_event(times(2, poisson(0.9, 0.5)), 0.05)
    assert stated < spent - 0.003
    assert delta_of_event(times(2, fixed(10, 9, 1.0)), 0.05, neighboring_relation=REPLACE) >= spent


@pytest.mark.parametrize(("sigma", "count"), [(2.0, 3), (300.0, 1), (300.0, 1000), (1e4, 50)])
def test_epsilon_of_fixed_batches_of_everything_is_the_analytic_gaussian(sigma, count):
    exact = gaussian_epsilon(sigma / 2 / math.sqrt(count), 1e-6)
    computed = epsilon_of_event(
        times(count, fixed(10, 10, sigma)), 1e-6, neighboring_relation=REPLACE
    )
    assert exact <= computed <= exact * 1.01


def test_epsilon_of_many_fixed_batches_is_between_poisson_and_rdp():
    epsilons = [
        epsilon_of_event(times(10_000, event), 1e-5, accountant=name, neighboring_relation=relation)
        for event, name, relation in [
            (poisson(1024 / 50_000, 2.0), "pld", ADD),
            (fixed(50_000, 1024, 4.0), "pld", REPLACE),
            (fixed(50_000, 1024, 2.0), "rdp", REPLACE),
        ]
    ]
    assert epsilons == sorted(epsilons)


@pytest.mark.parametrize("epsilon", [0.0, 0.4, 2.0])
@pytest.mark.parametrize("relation", [ADD, SPECIAL])
def test_delta_of_truncated_batches_covers_a_dataset_that_is_enumerated(relation, epsilon):
    # An example of 1 beside three of -1, sampled at 1/2 and truncated to one; and those without it.
    def released(examples):
        means_and_weights = []
        for kept in itertools.product([False, True], repeat=len(examples)):
            batch = [x for x, is_kept in zip(examples, kept, strict=True) if is_kept] or [0.0]
            means_and_weights += [(x, 0.5 ** len(examples) / len(batch)) for x in batch]
        return density(*means_and_weights)

    pair = released([1.0, -1.0, -1.0, -1.0]), released([-1.0, -1.0, -1.0])
    spent = max(divergence(epsilon, pair), divergence(epsilon, pair[::-1]))
    event = truncated(4, 0.5, 1, 1.0)
    computed = delta_of_event(event, epsilon, accountant=COARSE, neighboring_relation=relation)
    assert spent <= computed + ERROR
    # Accounted as the Poisson samples that they were before, they would be understated.
    if epsilon > 1:
        assert delta_of_event(poisson(0.5, 1.0), epsilon) < 0.3 * spent


# -- composition ----------------------------------------------------------------------------


def test_epsilon_does_not_depend_on_nesting():
    flat = events.ComposedDpEvent([times(12, poisson(0.1, 2.0)), times(9, gaussian(30.0))])
    inner = events.ComposedDpEvent([times(2, poisson(0.1, 2.0)), events.NoOpDpEvent()])
    nested = events.ComposedDpEvent(
        [times(3, times(2, inner)), times(3, times(3, gaussian(30.0))), times(0, gaussian(0.0))]
    )
    assert epsilon_of_event(nested, 1e-6) == epsilon_of_event(flat, 1e-6)


@pytest.mark.parametrize("accountant", composition.ACCOUNTANTS)
def test_gaussians_on_one_sample_are_one_gaussian(accountant):
    inner = events.ComposedDpEvent([times(9, gaussian(3.0)), times(3, gaussian(math.sqrt(3)))])
    one = epsilon_of_event(events.PoissonSampledDpEvent(0.1, inner), 1e-6, accountant=accountant)
    other = epsilon_of_event(poisson(0.1, math.sqrt(0.5)), 1e-6, accountant=accountant)
    assert one == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize("accountant", composition.ACCOUNTANTS)
@pytest.mark.parametrize(
    "event",
    [
        events.NoOpDpEvent(),
        events.ComposedDpEvent([]),
        times(0, events.NonPrivateDpEvent()),
        times(0, gaussian(0.0)),
        events.PoissonSampledDpEvent(0.0, gaussian(1.0)),
        events.PoissonSampledDpEvent(0.5, events.NoOpDpEvent()),
        truncated(100, 0.1, 0, 1.0),
        fixed(100, 0, 1.0),
        events.MixtureOfGaussiansDpEvent(1.0, [0.0, 1.0], [1.0, 0.0]),
        events.RandomizedResponseDpEvent(0.0, 1),
        events.DiscreteLaplaceDpEvent(0.1, 0),
    ],
)
def test_nothing_released_spends_nothing(event, accountant):
    assert epsilon_of_event(event, 1e-6, accountant=accountant) == 0.0
    assert delta_of_event(event, 0.0, accountant=accountant) == 0.0


@pytest.mark.parametrize(
    ("event", "accountant", "relation"),
    [
        (events.NonPrivateDpEvent(), "pld", ADD),
        (events.NonPrivateDpEvent(), "rdp", REPLACE),
        (gaussian(0.0), "pld", REPLACE),
        (poisson(0.1, 0.0), "rdp", ADD),
        (fixed(10, 2, 0.0), "rdp", REPLACE),
        (fixed(10, 2, 0.0), "pld", REPLACE),
        (truncated(10, 0.1, 2, 0.0), "pld", ADD),
        (events.MixtureOfGaussiansDpEvent(0.0, [0.0, 1.0], [0.5, 0.5]), "pld", ADD),
        (events.LaplaceDpEvent(0.0), "rdp", ADD),
        (events.ZCDpEvent(math.inf), "rdp", ADD),
    ],
)
def test_a_release_without_noise_spends_everything(event, accountant, relation):
    run = events.ComposedDpEvent([gaussian(5.0), event])
    settings = {"accountant": accountant, "neighboring_relation": relation}
    assert epsilon_of_event(run, 1e-6, **settings) == math.inf
    assert delta_of_event(run, 3.0, **settings) == 1.0


# -- epsilon and delta ----------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.3, 2.0, 40.0, 3000.0])
@pytest.mark.parametrize("epsilon", [0.0, 1e-4, 0.1, 3.0])
def test_delta_pld_of_whole_batches_is_the_analytic_gaussian(sigma, epsilon):
    exact = gaussian_delta(sigma, epsilon)
    computed = delta_of_event(gaussian(sigma), epsilon)
    assert exact <= computed * (1 + 1e-9)
    assert computed == pytest.approx(exact, rel=1e-6, abs=1e-14)


@hypothesis.settings(max_examples=4)
@hypothesis.given(
    noise_multiplier=st.floats(0.7, 50.0),
    sampling_prob=st.sampled_from([0.001, 0.05, 0.6, 1.0]),
    count=st.integers(1, 500),
    exponent=st.floats(-13.0, -0.5),
    accountant=st.sampled_from(composition.ACCOUNTANTS),
)
def test_delta_at_epsilon_at_delta_is_within(
    noise_multiplier, sampling_prob, count, exponent, accountant
):
    event, delta = times(count, poisson(sampling_prob, noise_multiplier)), 10.0**exponent
    epsilon = epsilon_of_event(event, delta, accountant=accountant)
    assert delta_of_event(event, epsilon, accountant=accountant) <= delta


@pytest.mark.parametrize(
    ("event", "relation"),
    [
        (times(9, MIXTURE), ADD),
        (times(9, truncated(1000, 0.1, 110, 2.0)), SPECIAL),
        (times(9, fixed(1000, 100, 2.0)), REPLACE),
        (times(9, poisson(0.1, 2.0)), REPLACE),
    ],
)
def test_delta_at_epsilon_at_delta_is_within_for_other_events(event, relation):
    settings = {"accountant": COARSE, "neighboring_relation": relation}
    epsilon = epsilon_of_event(event, 1e-6, **settings)
    assert 0 < epsilon < 10
    assert delta_of_event(event, epsilon, **settings) <= 1e-6
    assert delta_of_event(event, epsilon * 0.99, **settings) > 1e-6


@pytest.mark.parametrize("accountant", [COARSE, "rdp"])
def test_delta_does_not_grow_with_epsilon(accountant):
    deltas = [
        delta_of_event(times(50, poisson(0.05, 1.0)), epsilon, accountant=accountant)
        for epsilon in (0.0, 0.1, 5.0, 1000.0)
    ]
    assert all(b <= a * 1.001 for a, b in itertools.pairwise(deltas))
    assert deltas[-1] < 1e-14  # the roundings of the FFT are not all that is left


@pytest.mark.parametrize("accountant", [COARSE, "rdp"])
def test_epsilon_does_not_grow_with_delta(accountant):
    epsilons = [
        epsilon_of_event(times(50, poisson(0.05, 1.0)), delta, accountant=accountant)
        for delta in (1e-15, 1e-12, 1e-4, 0.9)
    ]
    assert all(b <= a for a, b in itertools.pairwise(epsilons))
    assert epsilons[-1] == 0.0


# -- at the ends of doubles -----------------------------------------------------------------


def test_epsilon_under_replace_one_is_refused_where_delta_is_lost_in_rounding():
    with pytest.raises(ValueError, match=r"`delta` must be at least .* got 1e-15. Choose a larger"):
        epsilon_of_event(times(9, poisson(0.1, 2.0)), 1e-15, neighboring_relation=REPLACE)


def test_epsilon_under_replace_one_does_not_fall_back_to_what_reads_events_otherwise():
    # Too many for the FFT; Rényi divergences of fixed batches would read twice the noise.
    event = times(2**21, fixed(1000, 1, 50.0))
    assert epsilon_of_event(event, 1e-5, neighboring_relation=REPLACE) == math.inf


def test_delta_beyond_the_fft_is_that_of_rdp():
    event = times(2**21, poisson(1e-3, 5.0))
    rdp = delta_of_event(event, 3.0, accountant="rdp")
    assert delta_of_event(event, 3.0) == rdp < 1.0


# -- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "accountant", "relation", "instead"),
    [
        (events.UnsupportedDpEvent(), "pld", ADD, "No accountant here does: use Poisson"),
        (events.SampledWithReplacementDpEvent(9, 3, times(2, gaussian(1.0))), "rdp", ADD, "No acc"),
        (poisson(0.1, 1.0), "rdp", REPLACE, "'pld' under REPLACE_ONE"),
        (fixed(10, 2, 1.0), "pld", ADD, "'pld' under REPLACE_ONE, 'rdp' under REPLACE_ONE. Choose"),
        (fixed(10, 2, 1.0), "rdp", SPECIAL, "'rdp' under REPLACE_ONE"),
        (truncated(10, 0.1, 2, 1.0), "rdp", ADD, "'pld' under REPLACE_SPECIAL"),
        (MIXTURE, "pld", REPLACE, "'pld' under ADD_OR_REMOVE_ONE"),
        (events.PoissonSampledDpEvent(0.1, events.ZCDpEvent(0.1)), "rdp", ADD, "No accountant"),
        (events.PoissonSampledDpEvent(0.1, times(2, MIXTURE)), "pld", ADD, "No accountant"),
    ],
)
def test_an_event_that_is_not_supported_is_refused(event, accountant, relation, instead):
    run = events.ComposedDpEvent([gaussian(1.0), times(2, event)])
    settings = {"accountant": accountant, "neighboring_relation": relation}
    message = f"by accountant '{accountant}' under {relation.name}, got {type(event).__name__}"
    with pytest.raises(ValueError, match=f"{message}.*{instead}"):
        epsilon_of_event(run, 1e-6, **settings)
    with pytest.raises(ValueError, match=message):
        delta_of_event(run, 1.0, **settings)


@pytest.mark.parametrize(
    ("event", "error", "message"),
    [
        ("poisson", TypeError, "`dp_event` must be a dp_accounting.DpEvent"),
        (gaussian(-1.0), ValueError, "`GaussianDpEvent.noise_multiplier` must be non-negative"),
        (gaussian(math.nan), ValueError, "`GaussianDpEvent.noise_multiplier`"),
        (gaussian("1"), TypeError, "`GaussianDpEvent.noise_multiplier`"),
        (poisson(1.5, 1.0), ValueError, "`PoissonSampledDpEvent.sampling_probability` must be in"),
        (times(-1, gaussian(1.0)), ValueError, "`SelfComposedDpEvent.count` must be at least 0"),
        (times(1.5, gaussian(1.0)), TypeError, "`SelfComposedDpEvent.count` must be an integer"),
        (fixed(10, 11, 1.0), ValueError, "`sample_size` must be at most source_dataset_size=10"),
        (truncated(-1, 0.1, 2, 1.0), ValueError, "Gaussian.*dataset_size` must be at least 0"),
        (events.MixtureOfGaussiansDpEvent(1.0, [0, 1], [0.5]), ValueError, "`sampling_probs` must"),
        (events.MixtureOfGaussiansDpEvent(1.0, [0, -1], [0.5, 0.5]), ValueError, "`sensitivities`"),
        (events.RandomizedResponseDpEvent(1.5, 2), ValueError, "Response.*must be at most 1"),
        (events.LaplaceDpEvent(-1.0), ValueError, "`LaplaceDpEvent.noise_multiplier`"),
    ],
)
def test_parameters_of_events_are_checked(event, error, message):
    with pytest.raises(error, match=message):
        epsilon_of_event(event, 1e-6, neighboring_relation=REPLACE)


def test_other_arguments_are_checked():
    with pytest.raises(ValueError, match="`accountant` must be one of 'pld', 'rdp'"):
        epsilon_of_event(gaussian(1.0), 1e-6, accountant="prv")
    with pytest.raises(TypeError, match="`neighboring_relation` must be a dp_acc"):
        epsilon_of_event(gaussian(1.0), 1e-6, neighboring_relation="replace")
    with pytest.raises(ValueError, match="`delta` must be in"):
        epsilon_of_event(gaussian(1.0), 0.0)
    with pytest.raises(ValueError, match="`epsilon` must be non-negative"):
        delta_of_event(gaussian(1.0), -1.0)


# -- settings of accountants ----------------------------------------------------------------


def test_a_wider_grid_states_more():
    event = times(100, poisson(0.02, 1.0))
    epsilons = [
        epsilon_of_event(event, 1e-6, accountant=composition.pld_accountant(interval))
        for interval in (None, 1e-3, 1e-1)
    ]
    assert epsilons == sorted(epsilons)
    assert epsilons[2] > 1.2 * epsilons[0]


def test_chosen_orders_are_used():
    accountant = composition.rdp_accountant([3])
    expected = 3 / 8 + math.log1p(-1 / 3) - math.log(3e-6) / 2
    computed = epsilon_of_event(gaussian(2.0), 1e-6, accountant=accountant)
    assert computed == pytest.approx(expected, rel=1e-9)


def test_settings_of_accountants_are_checked():
    with pytest.raises(ValueError, match=r"`orders` must be above 1, got 1.0"):
        composition.rdp_accountant([2.0, 1.0])
    with pytest.raises(ValueError, match=r"`interval` must be positive"):
        composition.pld_accountant(0.0)


# -- searches -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event_of", "accountant", "relation"),
    [
        (lambda nm: times(50, truncated(1000, 0.1, 110, nm)), COARSE, SPECIAL),
        (lambda nm: times(50, poisson(0.1, nm)), COARSE, REPLACE),
        (lambda nm: times(20, fixed(1000, 100, nm)), COARSE, REPLACE),
        (lambda nm: times(50, poisson(0.1, nm)), "rdp", ADD),
    ],
)
def test_smallest_noise_multiplier_is_one_sided_and_tight(event_of, accountant, relation):
    settings = {"accountant": accountant, "neighboring_relation": relation}
    found = composition.smallest_noise_multiplier(event_of, epsilon=1.0, delta=1e-5, **settings)
    spent, with_less = (
        epsilon_of_event(event_of(found * factor), 1e-5, **settings) for factor in (1, 0.999)
    )
    assert spent <= 1.0 < with_less


def test_smallest_noise_multiplier_says_when_there_is_none():
    with pytest.raises(ValueError, match=r"`epsilon` must be reachable, got 2.0"):
        composition.smallest_noise_multiplier(
            lambda _: gaussian(0.1), epsilon=2.0, delta=1e-5, accountant="rdp"
        )


def test_smallest_noise_multiplier_of_nothing_is_the_least():
    event = events.NoOpDpEvent()
    found = composition.smallest_noise_multiplier(lambda _: event, epsilon=2.0, delta=1e-5)
    assert found == 2**-10


@hypothesis.given(
    scale=st.floats(1e-3, 10.0),
    power=st.floats(0.3, 3.0),
    target=st.floats(0.01, 1e3),
    guess=st.integers(1, 5000),
    maximum=st.integers(1, 3000),
)
def test_largest_count_is_the_last_within(scale, power, target, guess, maximum):
    def spent(count):
        assert 1 <= count <= maximum
        return scale * count**power if count < 2000 else math.inf

    within = [count for count in range(1, maximum + 1) if spent(count) <= target]
    found = composition.largest_count(spent, target, maximum=maximum, guess=guess)
    assert found == max(within, default=0)


def test_largest_count_asks_few_times():
    asked = []
    composition.largest_count(lambda n: asked.append(n) or math.sqrt(n), 123.4)
    assert len(asked) < 25
