"""Training accountants with JAX Privacy's names: its values where they are bounds."""

import dataclasses
import math
from typing import Any

import dp_accounting
import numpy as np
import pytest
from scipy import stats

from dpbridge.accounting import accountants, analysis, calibrate, schedules
from dpbridge.accounting.analysis import DpParams, SamplingMethod
from dpkernels import composition

RDP, PLD = accountants.RdpAccountantConfig(), accountants.PldAccountantConfig()
# Of JAX Privacy's analysis_test.
PARAMS = DpParams(noise_multipliers=4.0, num_samples=50_000, delta=1e-5, batch_size=1024)
UPDATES = 10_000


def changed(**values: Any) -> DpParams:
    return dataclasses.replace(PARAMS, **values)


def epsilon(config: accountants.DpAccountantConfig, updates: int = UPDATES, **values: Any) -> float:
    return analysis.DpsgdTrainingAccountant(config).compute_epsilon(updates, changed(**values))


def test_default_orders_are_116() -> None:
    orders = np.array(RDP.orders)
    assert len(orders) == 116
    assert orders[[0, 49, 50, 105, 106, -1]] == pytest.approx([1.01, 8, 8, 63, 65, 512])


@pytest.mark.parametrize(
    ("config", "kind"),
    [(RDP, dp_accounting.rdp.RdpAccountant), (PLD, dp_accounting.pld.PLDAccountant)],
)
def test_create_accountant_is_that_of_dp_accounting(
    config: accountants.DpAccountantConfig, kind: type
) -> None:
    accountant = config.create_accountant()
    assert isinstance(accountant, kind)
    assert accountant.neighboring_relation is dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE


def test_settings_of_configs_are_checked() -> None:
    with pytest.raises(ValueError, match="`orders` must be above 1"):
        accountants.RdpAccountantConfig(orders=(0.5,))
    with pytest.raises(ValueError, match="`orders` must not be empty"):
        accountants.RdpAccountantConfig(orders=())
    with pytest.raises(ValueError, match="`interval` must be positive"):
        accountants.PldAccountantConfig(value_discretization_interval=-1e-4)


# -- values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "expected"), [(RDP, 2.27534), (PLD, 2.09246)])
def test_epsilon_of_dpsgd_is_that_of_jax_privacy(
    config: accountants.DpAccountantConfig, expected: float
) -> None:
    assert epsilon(config) == pytest.approx(expected, rel=1e-5)


def test_epsilon_of_a_wider_grid_is_that_of_jax_privacy() -> None:
    config = accountants.PldAccountantConfig(value_discretization_interval=1e-2)
    assert epsilon(config) == pytest.approx(2.73975, rel=1e-5)


def test_epsilon_of_cycles_is_that_of_the_part_an_example_is_in() -> None:
    part = epsilon(RDP)
    cycles = epsilon(RDP, 64 * UPDATES, num_samples=64 * 50_000, cycle_length=64)
    assert cycles == part
    assert epsilon(RDP, 64 * UPDATES - 63, num_samples=64 * 50_000, cycle_length=64) == part
    assert epsilon(RDP, 64 * UPDATES - 64, num_samples=64 * 50_000, cycle_length=64) < part


@pytest.mark.parametrize(
    ("values", "expected"),  # of JAX Privacy 2.0.0, RDP
    [
        ({"noise_multipliers": [(0, 4.0), (5000, 8.0)]}, 1.7512231),
        ({"batch_size_scale_schedule": {5000: 2}}, 3.8039113),
        ({"batch_size_scale_schedule": {2500: 2, 5000: 2}}, 8.1239801),
        ({"batch_size": [(0, 1024), (5000, 2048)]}, 3.8039113),
        (
            {
                "noise_multipliers": [(0, 4.0), (5000, 8.0)],
                "batch_size_scale_schedule": {5000: 2},
            },
            2.2580603,
        ),
    ],
)
def test_epsilon_of_schedules_is_that_of_jax_privacy(
    values: dict[str, Any], expected: float
) -> None:
    assert epsilon(RDP, **values) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("updates", "changed_updates"), [(5000, 0), (5001, 1)])
def test_a_schedule_changes_from_the_update_that_it_names_on(
    updates: int, changed_updates: int
) -> None:
    phases = changed(noise_multipliers=[(0, 4.0), (5000, 2.0)]).phases(updates)
    assert [phase.updates for phase in phases] == [5000, changed_updates][: len(phases)]
    assert sum(phase.updates for phase in phases) == updates


def test_epsilon_of_truncated_batches() -> None:
    # 3.09152 in JAX Privacy 1.0, of an accounting that was replaced since.
    assert epsilon(PLD, truncated_batch_size=1056) == pytest.approx(4.0691, rel=1e-4)


def test_epsilon_of_users_is_that_of_jax_privacy() -> None:
    config = accountants.PldAccountantConfig(value_discretization_interval=1e-2)
    accountant = analysis.DpsgdTrainingUserLevelAccountant(config)
    users = accountant.compute_epsilon(UPDATES, changed(examples_per_user=2))
    assert users == pytest.approx(5.00008, rel=1e-6)
    one = accountant.compute_epsilon(UPDATES, changed(examples_per_user=1))
    assert one == pytest.approx(epsilon(config), rel=1e-6)


def test_epsilon_of_users_covers_examples_that_all_change() -> None:
    # Two examples of one user, each in the batch with probability 1/2, move the sum by up to 2.
    config = accountants.PldAccountantConfig(value_discretization_interval=1e-2)
    params = changed(
        examples_per_user=2, noise_multipliers=1.0, batch_size=5, num_samples=10, delta=0.1
    )
    spent = analysis.DpsgdTrainingUserLevelAccountant(config).compute_epsilon(1, params)
    outputs = np.arange(-9, 12, 1e-3)
    means = stats.norm.pdf(outputs[:, None] - np.arange(3))
    excess = means @ [0.25, 0.5, 0.25] - math.exp(spent) * means[:, 0]
    assert np.maximum(excess, 0).sum() * 1e-3 == pytest.approx(0.1, rel=1e-2)


def test_epsilon_of_a_single_release_is_that_of_one_gaussian() -> None:
    accountant = analysis.SingleReleaseTrainingAccountant(PLD)
    assert accountant.compute_epsilon(UPDATES, PARAMS) == pytest.approx(0.92634, rel=1e-4)
    assert accountant.compute_epsilon(1, PARAMS) == accountant.compute_epsilon(UPDATES, PARAMS)


# -- batches of a fixed size ----------------------------------------------------------------


@pytest.mark.parametrize(("config", "event_noise"), [(PLD, 4.0), (RDP, 2.0)])
def test_epsilon_of_fixed_batches_is_that_of_sampling_without_replacement(
    config: accountants.DpAccountantConfig, event_noise: float
) -> None:
    gaussian = dp_accounting.GaussianDpEvent(event_noise)
    step = dp_accounting.SampledWithoutReplacementDpEvent(50_000, 1024, gaussian)
    expected = composition.epsilon_of_event(
        dp_accounting.SelfComposedDpEvent(step, UPDATES),
        1e-5,
        accountant="pld" if config is PLD else "rdp",
        neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE,
    )
    computed = epsilon(config, sampling_method=SamplingMethod.FIXED_BATCH_SIZE)
    assert computed == pytest.approx(expected, rel=1e-3)


def test_epsilon_of_fixed_batches_is_not_that_of_poisson_samples_with_half_the_noise() -> None:
    # JAX Privacy 1.0 states 4.89011 here. That no bound comes of it in general is shown by
    # datasets in tests/kernels/test_composition.py.
    computed = epsilon(PLD, sampling_method=SamplingMethod.FIXED_BATCH_SIZE)
    assert epsilon(PLD, noise_multipliers=2.0) == pytest.approx(4.89011, rel=1e-5)
    assert computed == pytest.approx(5.8176, rel=1e-4)


# -- ends -----------------------------------------------------------------------------------

ALL = [
    analysis.DpsgdTrainingAccountant(PLD),
    analysis.DpsgdTrainingAccountant(RDP),
    analysis.DpsgdTrainingUserLevelAccountant(PLD),
    analysis.SingleReleaseTrainingAccountant(RDP),
]


@pytest.mark.parametrize("accountant", ALL)
def test_epsilon_of_no_updates_is_zero(accountant: analysis.DpTrainingAccountant) -> None:
    assert accountant.compute_epsilon(0, changed(is_finite_guarantee=False)) == 0.0


@pytest.mark.parametrize("accountant", ALL)
@pytest.mark.parametrize("values", [{"is_finite_guarantee": False}, {"noise_multipliers": 0.0}])
def test_epsilon_without_a_guarantee_is_infinite(
    accountant: analysis.DpTrainingAccountant, values: dict[str, Any]
) -> None:
    is_user_level = isinstance(accountant, analysis.DpsgdTrainingUserLevelAccountant)
    params = changed(examples_per_user=2 if is_user_level else None, **values)
    assert accountant.compute_epsilon(3, params) == math.inf


@pytest.mark.parametrize(
    ("accountant", "values", "message"),
    [
        (ALL[0], {"noise_multipliers": None}, "`noise_multipliers` must be given"),
        (ALL[0], {"examples_per_user": 2}, "got 2. Use DpsgdTrainingUserLevelAccountant"),
        (
            ALL[0],
            {"cycle_length": 4, "noise_multipliers": [(0, 4.0), (50, 8.0)]},
            "`cycle_length` must be what this accountant supports, got 4. .* constant",
        ),
        (
            ALL[0],
            {"cycle_length": 4, "batch_size_scale_schedule": {900: 2}},
            "`cycle_length` must be what this accountant supports",
        ),
        (ALL[0], {"cycle_length": 64}, "`batch_size` must be at most .* = 781, got 1024"),
        (ALL[0], {"batch_size": 50_001}, "`batch_size` must be at most"),
        (ALL[1], {"truncated_batch_size": 9}, "`truncated_batch_size` must be left out unless"),
        (
            ALL[0],
            {"truncated_batch_size": 9, "sampling_method": SamplingMethod.FIXED_BATCH_SIZE},
            "`truncated_batch_size` must be left out unless",
        ),
        (ALL[2], {}, "`examples_per_user` must be given"),
        (
            ALL[2],
            {"examples_per_user": 2, "sampling_method": SamplingMethod.FIXED_BATCH_SIZE},
            "`sampling_method` must be what this accountant supports",
        ),
        (ALL[2], {"examples_per_user": 2, "cycle_length": 2}, "`cycle_length` must be"),
        (ALL[2], {"examples_per_user": 2, "truncated_batch_size": 9}, "`truncated_batch_size`"),
        (ALL[3], {"examples_per_user": 2}, "`examples_per_user` must be"),
        (ALL[3], {"noise_multipliers": [(0, 4.0), (5, 1.0)]}, "`noise_multipliers` must be"),
        (
            analysis.DpsgdTrainingUserLevelAccountant(RDP),
            {"examples_per_user": 2},
            "must be supported by accountant 'rdp'",
        ),
    ],
)
def test_what_an_accountant_cannot_account_for_is_refused(
    accountant: analysis.DpTrainingAccountant, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        accountant.compute_epsilon(100, changed(**values))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"noise_multipliers": -1.0}, ValueError, "`noise_multipliers` must be non-negative"),
        ({"noise_multipliers": []}, ValueError, "`noise_multipliers` must hold from update 0 on"),
        ({"noise_multipliers": [(1, 2.0)]}, ValueError, "must hold from update 0 on"),
        ({"noise_multipliers": [(0, 2.0), (0, 3.0)]}, ValueError, r"got \[0, 0\]"),
        ({"noise_multipliers": [2.0, 3.0]}, TypeError, "must consist of pairs, got 2.0"),
        ({"noise_multipliers": [(0.5, 2.0)]}, TypeError, "must be an integer"),
        ({"num_samples": 0}, ValueError, "`num_samples` must be at least 1"),
        ({"delta": 0.0}, ValueError, "`delta` must be in"),
        ({"batch_size": 10.5}, TypeError, "`batch_size` must be an integer"),
        ({"batch_size_scale_schedule": {5: 0.5}}, TypeError, "`batch_size_scale_schedule` must"),
        ({"batch_size_scale_schedule": {-5: 2}}, ValueError, "`batch_size_scale_schedule` must"),
        ({"cycle_length": 0}, ValueError, "`cycle_length` must be at least 1"),
        ({"sampling_method": "poisson"}, TypeError, "`sampling_method` must be a SamplingMethod"),
    ],
)
def test_params_are_checked(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        changed(**values)


def test_number_of_updates_is_checked() -> None:
    with pytest.raises(ValueError, match="`num_updates` must be at least 0"):
        ALL[1].compute_epsilon(-1, PARAMS)


# -- the cache ------------------------------------------------------------------------------


class Counting:
    """An accountant whose epsilon is the number of updates."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def compute_epsilon(
        self, num_updates: int, dp_params: DpParams, allow_approximate_cache: bool = False
    ) -> float:
        assert dp_params.delta == 1e-5
        assert not allow_approximate_cache
        self.asked.append(num_updates)
        return float(num_updates)

    def can_calibrate_steps(self) -> bool:
        return True

    can_calibrate_batch_size = can_calibrate_noise_multipliers = can_calibrate_steps


@pytest.mark.parametrize(("most", "points"), [(1000, 10), (7, 100), (1001, 3)])
def test_a_cached_epsilon_is_that_of_as_many_updates_or_more(most: int, points: int) -> None:
    counting = Counting()
    cached = analysis.CachedExperimentAccountant(counting, most, points)
    for updates in [*range(0, most, 1 + most // 50), most]:
        value = cached.compute_epsilon(updates, PARAMS, allow_approximate_cache=True)
        assert updates <= value <= min(updates + most / points + 1, most + 1)
    assert len(counting.asked) == len(set(counting.asked)) <= points + 1


def test_an_exact_epsilon_is_not_cached() -> None:
    counting = Counting()
    cached = analysis.CachedExperimentAccountant(counting, 1000, 10)
    assert cached.compute_epsilon(123, PARAMS) == 123


def test_a_cache_tells_parameters_apart() -> None:
    cached = analysis.CachedExperimentAccountant(ALL[3], 100)
    one, other = (
        cached.compute_epsilon(9, params, allow_approximate_cache=True)
        for params in (PARAMS, changed(noise_multipliers=[(0, 5.0)]))
    )
    assert one > other


def test_a_cache_ends_where_it_was_told_to() -> None:
    cached = analysis.CachedExperimentAccountant(Counting(), 100)
    with pytest.raises(ValueError, match="`num_updates` must be at most max_num_updates = 100"):
        cached.compute_epsilon(101, PARAMS, allow_approximate_cache=True)


# -- calibration ----------------------------------------------------------------------------

TARGET: dict[str, Any] = {"num_samples": 50_000, "target_delta": 1e-5}


def test_calibrations_are_those_of_jax_privacy_from_below() -> None:
    accountant, spent = analysis.DpsgdTrainingAccountant(RDP), epsilon(RDP)
    target = TARGET | {"accountant": accountant, "target_epsilon": spent}
    noise = calibrate.calibrate_noise_multiplier(batch_sizes=1024, num_updates=UPDATES, **target)
    assert noise == pytest.approx(4.0, rel=1e-4)
    assert epsilon(RDP, noise_multipliers=noise) <= spent
    updates = calibrate.calibrate_num_updates(noise_multipliers=4.0, batch_sizes=1024, **target)
    assert updates == UPDATES
    size = calibrate.calibrate_batch_size(noise_multipliers=4.0, num_updates=UPDATES, **target)
    assert size == 1024


def test_calibrated_schedules_stay_within() -> None:
    target, accountant = 1.0, analysis.DpsgdTrainingAccountant(RDP)
    settings = TARGET | {"accountant": accountant, "target_epsilon": target}
    updates = calibrate.calibrate_num_updates(
        noise_multipliers=[(0, 4.0), (50, 2.0)], batch_sizes=[(0, 512), (99, 1024)], **settings
    )
    schedule = {"noise_multipliers": [(0, 4.0), (50, 2.0)], "batch_size": [(0, 512), (99, 1024)]}
    assert epsilon(RDP, updates, **schedule) <= target < epsilon(RDP, updates + 1, **schedule)


def test_calibrated_updates_are_whole_cycles() -> None:
    updates = calibrate.calibrate_num_updates(
        target_epsilon=1.0,
        accountant=analysis.DpsgdTrainingAccountant(RDP),
        noise_multipliers=4.0,
        batch_sizes=1024,
        cycle_length=7,
        **TARGET,
    )
    assert updates == 280  # of JAX Privacy 2.0.0


def test_calibrated_fixed_batches_stay_within() -> None:
    fixed = SamplingMethod.FIXED_BATCH_SIZE
    size = calibrate.calibrate_batch_size(
        target_epsilon=2.0,
        accountant=analysis.DpsgdTrainingAccountant(PLD),
        noise_multipliers=4.0,
        num_updates=100,
        sampling_method=fixed,
        num_samples=1000,
        target_delta=1e-5,
    )
    spent, more = (
        epsilon(PLD, 100, batch_size=size + one, num_samples=1000, sampling_method=fixed)
        for one in (0, 1)
    )
    assert spent <= 2.0 < more


def test_calibrations_say_when_a_target_cannot_be_reached() -> None:
    settings = TARGET | {"accountant": ALL[1], "target_epsilon": 1e-4, "noise_multipliers": 0.1}
    with pytest.raises(ValueError, match="`target_epsilon` must be what one update spends"):
        calibrate.calibrate_num_updates(batch_sizes=1024, **settings)
    with pytest.raises(ValueError, match="`target_epsilon` must be what batches of one example"):
        calibrate.calibrate_batch_size(num_updates=10_000, **settings)


@pytest.mark.parametrize(
    ("function", "values"),
    [
        (calibrate.calibrate_num_updates, {"noise_multipliers": 1.0, "batch_sizes": 10}),
        (calibrate.calibrate_batch_size, {"noise_multipliers": 1.0, "num_updates": 10}),
    ],
)
def test_what_has_no_effect_is_not_calibrated(function: Any, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got SingleReleaseTrainingAccountant"):
        function(target_epsilon=1.0, accountant=ALL[3], **TARGET, **values)


def test_scaled_sizes_multiply() -> None:
    assert schedules.scaled(((0, 3), (4, 5)), {2: 2, 6: 3}) == ((0, 3), (2, 6), (4, 10), (6, 30))
