"""Configs and the plans they make: noise, event and epsilon belong together."""

import json
import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpkernels.execution_plan import (
    BandMFConfig,
    DPExecutionPlan,
    DPSGDConfig,
    NonPrivateConfig,
    PerformanceFlags,
    config_from_dict,
    config_to_dict,
)

Relation = dp_accounting.NeighboringRelation
POISSON = {"iterations": 20, "sampling_prob": 0.25, "noise_multiplier": 1.5}
FIXED = {"iterations": 20, "batch_size": 10, "num_examples": 40, "noise_multiplier": 1.5}
TRUNCATED = {**POISSON, "truncated_batch_size": 12, "num_examples": 40}
BANDED = {
    "iterations": 12,
    "expected_participations": 2.0,
    "strategy": (2.0, 1.0, 0.5),
    "noise_multiplier": 1.5,
}
CONFIGS = {
    "poisson": DPSGDConfig(**POISSON),
    "zero-out": DPSGDConfig(**POISSON, neighboring_relation=Relation.REPLACE_SPECIAL),
    "replace-one": DPSGDConfig(**POISSON, neighboring_relation=Relation.REPLACE_ONE),
    "truncated": DPSGDConfig(**TRUNCATED),
    "truncated replace-one": DPSGDConfig(**TRUNCATED, neighboring_relation=Relation.REPLACE_ONE),
    "fixed": DPSGDConfig(**FIXED),
    "layers": DPSGDConfig(**POISSON, l2_clip_norm={"b": 3.0, "w": 4.0}, normalize_by=10.0),
    "banded": BandMFConfig(**BANDED),
    "banded zero-out": BandMFConfig(**BANDED, num_examples=50),
    "banded truncated": BandMFConfig(**BANDED, num_examples=60, truncated_batch_size=12),
}
QUICK = ("replace-one",)
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def noise_of(plan: DPExecutionPlan, steps: int, size: int = 20_000) -> np.ndarray:
    """Returns `(steps, size)` noise: what a plan makes of sums of zeros."""
    zeros = {"w": jnp.zeros(size)}
    state = plan.noise_addition_transform.init(zeros)
    rows = []
    for _ in range(steps):
        noised, state = plan.noise_addition_transform.update(zeros, state)
        rows.append(np.asarray(noised["w"], np.float64))
    return np.stack(rows)


@every_config
def test_first_noise_has_the_multiplier_times_the_sensitivity(config):
    # Row 0 of C⁻¹Z is Z₀ over the first coefficient of the strategy scaled to norm 1.
    plan = config.make(PerformanceFlags(noise_seed=0))
    clipped = plan.clipped_grad(lambda w, x: jnp.sum(w["w"] * x))
    expected = config.noise_multiplier * clipped.sensitivity(plan.neighboring_relation)
    if isinstance(config, BandMFConfig):
        expected *= math.hypot(*config.strategy) / config.strategy[0]
    # 20,000 draws: seven deviations of the estimate are 3.5 %.
    assert noise_of(plan, 1).std() == pytest.approx(expected, rel=0.035)


def test_replace_one_has_twice_the_noise():
    usual = CONFIGS["poisson"].make(PerformanceFlags(noise_seed=0))
    replaced = CONFIGS["replace-one"].make(PerformanceFlags(noise_seed=0))
    np.testing.assert_allclose(noise_of(replaced, 1), 2 * noise_of(usual, 1), rtol=1e-6)


def test_layers_add_their_norms_in_quadrature():
    assert CONFIGS["layers"].sensitivity() == pytest.approx(0.5)


def test_rescaled_layers_count_instead_of_their_norms():
    config = DPSGDConfig(
        **POISSON, l2_clip_norm={"b": 3.0, "w": 4.0}, rescale_to_unit_norm=True, normalize_by=10.0
    )
    assert config.sensitivity() == pytest.approx(math.sqrt(2) / 10)


@every_config
def test_clipped_gradients_stay_within_the_bound(config):
    plan = config.make()
    params = {"b": jnp.zeros(3), "w": jnp.zeros(3)}

    def loss(params, x):
        return jnp.sum(params["w"] * x) + 7 * jnp.sum(params["b"] * x)

    clipped = plan.clipped_grad(loss)
    total = clipped(params, jnp.full((1, 3), 1e3))
    norm = math.sqrt(sum(float(jnp.sum(x * x)) for x in jax.tree.leaves(total)))
    assert norm == pytest.approx(clipped.l2_norm_bound, rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=pytest.mark.slow if "truncated" in name else ())
        for name, config in CONFIGS.items()
    ],
)
def test_epsilon_is_that_of_the_event(config):
    plan = config.make()
    assert plan.epsilon(1e-5) == config.epsilon(1e-5)
    assert plan.dp_event == config.dp_event()
    assert plan.epsilon(1e-5, steps=0) == 0.0
    assert 0 < plan.epsilon(1e-5, steps=1) <= plan.epsilon(1e-5)


@pytest.mark.parametrize(
    "config",
    [
        # Each calibration asks for some ten epsilons.
        pytest.param(config, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, config in CONFIGS.items()
    ],
)
def test_calibration_never_overshoots_and_is_tight(config):
    calibrated = config.calibrate(epsilon=1.0, delta=1e-5)
    assert calibrated.epsilon(1e-5) <= 1.0
    assert calibrated.epsilon(1e-5) > 0.99
    assert type(calibrated) is type(config)
    assert calibrated.iterations == config.iterations


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_full_batches_under_add_or_remove_are_a_gaussian(accountant):
    config = DPSGDConfig(iterations=10, sampling_prob=1.0, noise_multiplier=4.0)
    golden = {"pld": 3.341409, "rdp": 3.617099}[accountant]  # dp_accounting 0.6, Gaussian(4) × 10
    assert config.epsilon(1e-5, accountant=accountant) == pytest.approx(golden, rel=1e-3)


@pytest.mark.parametrize("sizes", [{"sampling_prob": 1.0}, {"batch_size": 40, "num_examples": 40}])
def test_full_batches_under_replace_one_are_a_gaussian_too(sizes):
    # Noise of 4 sensitivities is noise of 4 sensitivities: the sensitivity is what doubled. An
    # accountant asked in the other one's convention would answer 7.5 or 1.6 instead.
    config = DPSGDConfig(
        iterations=10, noise_multiplier=4.0, neighboring_relation=Relation.REPLACE_ONE, **sizes
    )
    for accountant in config.accountants:
        assert 3.34 < config.epsilon(1e-5, accountant=accountant) < 3.65


def test_replace_one_spends_less_than_two_removals_of_twice_the_noise():
    # Replacing is removing and adding; group privacy of two bounds it from above.
    replaced = CONFIGS["replace-one"].epsilon(1e-5)
    one = DPSGDConfig(**{**POISSON, "noise_multiplier": 3.0}).epsilon(1e-6)
    assert one < replaced < 2 * one


def test_golden_epsilons():
    config = DPSGDConfig(iterations=2250, sampling_prob=0.04, noise_multiplier=1.5)
    assert config.epsilon(1e-5, accountant="rdp") == pytest.approx(7.329335, rel=1e-3)
    assert config.epsilon(1e-5) == pytest.approx(6.768787, rel=1e-3)
    config = DPSGDConfig(iterations=512, sampling_prob=0.1).calibrate(epsilon=1.0, delta=1e-6)
    assert config.noise_multiplier == pytest.approx(9.6618, rel=1e-3)


@pytest.mark.slow
def test_truncation_never_states_less_than_plain_poisson_zero_out():
    assert CONFIGS["truncated"].epsilon(1e-5) >= CONFIGS["zero-out"].epsilon(1e-5) * (1 - 1e-3)


def test_one_band_is_dpsgd():
    banded = BandMFConfig(
        iterations=20, expected_participations=5.0, strategy=(3.0,), noise_multiplier=1.5
    )
    usual = CONFIGS["poisson"]
    assert banded.epsilon(1e-5) == usual.epsilon(1e-5)
    flags = PerformanceFlags(noise_seed=0)
    np.testing.assert_allclose(
        noise_of(banded.make(flags), 3), noise_of(usual.make(flags), 3), rtol=1e-5
    )


def strategy_matrix(config: BandMFConfig) -> np.ndarray:
    n, coefs = config.iterations, np.asarray(config.strategy)
    matrix = sum(c * np.eye(n, k=-i) for i, c in enumerate(coefs))
    norms = np.linalg.norm(matrix, axis=0)
    return matrix / (norms if config.column_normalize else norms.max())


@pytest.mark.parametrize("column_normalize", [False, True])
@pytest.mark.parametrize("strategy", [(2.0, 1.0, 0.5), (0.5,), (2.0,), (0.1, 0.05)])
def test_banded_noise_is_the_inverse_of_its_strategy(strategy, column_normalize):
    # JAX Privacy 2.3 under-noises a column-normalised strategy of norm 0.5 by half.
    config = BandMFConfig(**{**BANDED, "strategy": strategy}, column_normalize=column_normalize)
    noise = noise_of(config.make(PerformanceFlags(noise_seed=1)), config.iterations)
    white = strategy_matrix(config) @ noise / config.noise_multiplier
    covariance = white @ white.T / noise.shape[1]
    # Entries of the estimate deviate by at most sqrt(2 / 20,000) = 1 %; 7 deviations.
    np.testing.assert_allclose(covariance, np.eye(config.iterations), atol=0.07)


def test_banded_event_has_a_round_for_each_turn():
    config = CONFIGS["banded"]
    assert (config.num_bands, config.sampling_prob) == (3, 0.5)
    assert [config.dp_event(steps=steps).count for steps in (1, 3, 4, 12)] == [1, 1, 2, 4]
    strategy = config.make().batch_selection_strategy
    assert (strategy.cycle_length, strategy.sampling_prob) == (3, 0.5)


def test_banded_groups_follow_the_neighbours():
    usual = CONFIGS["banded"].make()
    assert usual.neighboring_relation is Relation.ADD_OR_REMOVE_ONE
    assert usual.batch_selection_strategy.partition_type.name == "INDEPENDENT"
    zeroed = CONFIGS["banded zero-out"].make()
    assert zeroed.neighboring_relation is Relation.REPLACE_SPECIAL
    assert zeroed.batch_selection_strategy.partition_type.name == "EQUAL_SPLIT"


def test_default_strategy_is_better_than_white_noise():
    banded = BandMFConfig.default(
        num_bands=4, iterations=100, expected_participations=5, noise_multiplier=1.0
    )
    np.testing.assert_allclose(banded.strategy, [0.68298, 0.48280, 0.41446, 0.35869], rtol=1e-3)
    assert banded.rmse == pytest.approx(3.9161, rel=1e-3)
    white = BandMFConfig(
        iterations=100, expected_participations=5, strategy=(1.0,), noise_multiplier=1.0
    )
    assert white.rmse == pytest.approx(7.1063, rel=1e-3)


def test_non_private_plan_is_the_mean_gradient_and_has_no_epsilon():
    plan = NonPrivateConfig(iterations=3, batch_size=4).make()
    x = jnp.array([[1e6, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    total = plan.clipped_grad(lambda w, x: jnp.sum(w * x))(jnp.zeros(2), x)
    noised, _ = plan.noise_addition_transform.update(
        total, plan.noise_addition_transform.init(total)
    )
    np.testing.assert_allclose(noised, x.mean(0), rtol=1e-6)
    assert plan.epsilon(1e-5) == math.inf
    assert plan.epsilon(1e-5, steps=0) == 0.0


@every_config
def test_config_survives_json(config):
    restored = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert restored == config


def test_config_from_dict_refuses_what_is_damaged():
    state = config_to_dict(CONFIGS["poisson"])
    for broken in ({}, {**state, "type": "Other"}, {**state, "extra": 1}, {"type": "DPSGDConfig"}):
        with pytest.raises(ValueError, match="`state` must be what `config_to_dict` returns"):
            config_from_dict(broken)
    with pytest.raises(ValueError, match="`noise_multiplier`"):
        config_from_dict({**state, "noise_multiplier": "1"})
    with pytest.raises(TypeError, match="`config` must be one of"):
        config_to_dict("poisson")


@every_config
def test_config_is_frozen(config):
    with pytest.raises(AttributeError):
        config.noise_multiplier = 0.1


def test_plan_by_hand_states_the_whole_event_for_any_step():
    made = CONFIGS["poisson"].make()
    plan = DPExecutionPlan(
        made.clipped_grad,
        made.batch_selection_strategy,
        made.noise_addition_transform,
        made.dp_event,
        made.neighboring_relation,
    )
    assert plan.epsilon(1e-5, steps=1) == plan.epsilon(1e-5) == made.epsilon(1e-5)
    assert plan.epsilon(1e-5, steps=0) == 0.0


def test_plan_refuses_steps_that_it_does_not_have():
    plan = CONFIGS["poisson"].make()
    with pytest.raises(ValueError, match="`steps` must be at most the plan's 20"):
        plan.epsilon(1e-5, steps=21)
    with pytest.raises(ValueError, match="`steps` must be at most `iterations`, 20"):
        CONFIGS["poisson"].epsilon(1e-5, steps=21)


def test_make_refuses_a_config_without_noise():
    config = DPSGDConfig(iterations=20, sampling_prob=0.25)
    for ask in (config.make, lambda: config.epsilon(1e-5)):
        with pytest.raises(ValueError, match="`noise_multiplier` must be known"):
            ask()


@pytest.mark.parametrize(
    ("name", "accountant"),
    [("truncated", "rdp"), ("replace-one", "rdp"), ("banded truncated", "rdp")],
)
def test_accountants_that_cannot_answer_are_refused(name, accountant):
    with pytest.raises(ValueError, match="`accountant` must be one of"):
        CONFIGS[name].epsilon(1e-5, accountant=accountant)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 0}, "`iterations` must be at least 1"),
        ({"sampling_prob": 0.0}, "`sampling_prob` must be in"),
        ({"sampling_prob": 1.5}, "`sampling_prob` must be in"),
        ({"sampling_prob": None}, "Either `sampling_prob` or `batch_size`"),
        ({"batch_size": 5}, "Either `sampling_prob` or `batch_size`"),
        ({"num_examples": 5}, "`num_examples` must be given with"),
        ({"truncated_batch_size": 5}, "`num_examples` must be given with"),
        ({"noise_multiplier": -1.0}, "`noise_multiplier` must be"),
        ({"noise_multiplier": math.nan}, "`noise_multiplier` must be"),
        ({"l2_clip_norm": 0.0}, "`l2_clip_norm` must be positive"),
        ({"l2_clip_norm": {"w": -1.0}}, "`l2_clip_norm` must be positive"),
        ({"l2_clip_norm": {}}, "`l2_clip_norm` must hold a number"),
        ({"normalize_by": 0.0}, "`normalize_by` must be positive"),
        (
            {
                "truncated_batch_size": 5,
                "num_examples": 9,
                "neighboring_relation": Relation.ADD_OR_REMOVE_ONE,
            },
            "`neighboring_relation` must be one of",
        ),
    ],
)
def test_dpsgd_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        DPSGDConfig(**{**POISSON, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 41}, "`batch_size` must be at most `num_examples`"),
        ({"truncated_batch_size": 5}, "`truncated_batch_size` must go with `sampling_prob`"),
        (
            {"neighboring_relation": Relation.ADD_OR_REMOVE_ONE},
            "`neighboring_relation` must be one of",
        ),
    ],
)
def test_fixed_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        DPSGDConfig(**{**FIXED, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": ()}, "`strategy` must be 1 to 12"),
        ({"strategy": tuple([1.0] * 13)}, "`strategy` must be 1 to 12"),
        ({"strategy": ((1.0,),)}, "`strategy` must be 1 to 12"),
        ({"strategy": (0.0, 1.0)}, "`strategy` must be finite and begin"),
        ({"strategy": (1.0, math.nan)}, "`strategy` must be finite and begin"),
        ({"expected_participations": 4.5}, "`expected_participations` must be at most"),
        ({"expected_participations": 0.0}, "`expected_participations` must be positive"),
        ({"truncated_batch_size": 5}, "`num_examples` must be given"),
        ({"num_examples": 2}, "`num_examples` must be at least 3"),
    ],
)
def test_bandmf_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        BandMFConfig(**{**BANDED, **change})


def test_config_refuses_what_is_no_flag():
    with pytest.raises(TypeError, match="`rescale_to_unit_norm` must be True or False"):
        DPSGDConfig(**POISSON, rescale_to_unit_norm=1)
