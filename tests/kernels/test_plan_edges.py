"""Plans that are changed after they were made, and configs that no sound plan can be made of."""

import copy
import dataclasses
import json
import math
import pickle

import dp_accounting
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpkernels import accounting, gaussian_privatizer
from dpkernels.batch_selection import BallsInBinsSampling, CyclicPoissonSampling
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
POISSON = DPSGDConfig(iterations=10, sampling_prob=0.1, noise_multiplier=1.0)
LAYERS = {"w": 3.0, "rest": [4.0, {"b": 12.0}]}
PLAN = POISSON.make()


def layered(norms=LAYERS):
    return dataclasses.replace(POISSON, l2_clip_norm=norms)


# A config's epsilon is for the config's parts.

OTHER_PARTS = {
    "event": {"dp_event": dp_accounting.NonPrivateDpEvent()},
    "noise": {"noise_addition_transform": gaussian_privatizer(stddev=1e-3)},
    "clipping": {"clipped_grad": layered().make().clipped_grad},
    "other batches": {"batch_selection_strategy": BallsInBinsSampling(10, 10)},
    "more in a batch": {
        "batch_selection_strategy": CyclicPoissonSampling(sampling_prob=1.0, iterations=10)
    },
    "relation": {"neighboring_relation": Relation.REPLACE_ONE},
    "config": {"config": dataclasses.replace(POISSON, noise_multiplier=9.0)},
}


@pytest.mark.parametrize("parts", OTHER_PARTS.values(), ids=OTHER_PARTS.keys())
def test_a_changed_plan_does_not_keep_the_epsilon_of_its_config(parts):
    with pytest.raises(ValueError, match=r"`config` must be None in a plan that is .* changed"):
        dataclasses.replace(PLAN, **parts)


def test_a_plan_by_hand_does_not_take_the_epsilon_of_a_config():
    parts = {field.name: getattr(PLAN, field.name) for field in dataclasses.fields(PLAN)}
    parts["noise_addition_transform"] = optax.identity()
    with pytest.raises(ValueError, match="`config` must be None in a plan that is put together"):
        DPExecutionPlan(**parts)


def test_a_changed_plan_without_a_config_states_its_own_epsilon():
    event = accounting.dpsgd_event(0.5, 10, sampling_prob=0.1)
    noise = gaussian_privatizer(stddev=0.5)
    changed = dataclasses.replace(PLAN, dp_event=event, noise_addition_transform=noise, config=None)
    expected = dataclasses.replace(POISSON, noise_multiplier=0.5).epsilon(1e-5)
    assert changed.epsilon(1e-5) == expected > PLAN.epsilon(1e-5)


def test_a_changed_plan_without_privacy_still_has_none():
    plan = NonPrivateConfig(iterations=3, batch_size=2).make()
    changed = dataclasses.replace(plan, noise_addition_transform=gaussian_privatizer(stddev=9.0))
    assert changed.epsilon(1e-5) == math.inf


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_copied_plan_states_the_same(duplicate):
    twin = duplicate(PLAN)
    assert twin.config == POISSON
    assert twin.epsilon(1e-5, steps=3) == PLAN.epsilon(1e-5, steps=3)


# The events of a plan by hand have one convention.


def test_replace_one_by_hand_is_read_in_one_convention():
    config = DPSGDConfig(iterations=10, batch_size=5, num_examples=50, noise_multiplier=1.0)
    made = config.make()
    plan = dataclasses.replace(made, config=None)
    assert plan.epsilon(1e-5) == plan.epsilon(1e-5, accountant="pld") == config.epsilon(1e-5)
    # Read by the RDP accountant, this event has twice the noise that there is.
    with pytest.raises(ValueError, match="`accountant` must be one of 'pld', got 'rdp'"):
        plan.epsilon(1e-5, accountant="rdp")
    assert made.epsilon(1e-5, accountant="rdp") > made.epsilon(1e-5)


def test_other_relations_by_hand_have_every_accountant():
    plan = dataclasses.replace(PLAN, config=None)
    assert plan.epsilon(1e-5, accountant="rdp") == POISSON.epsilon(1e-5, accountant="rdp")


# Half precision.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, "float16", jnp.int32, jnp.complex64])
def test_flags_refuse_types_that_do_not_hold_a_sum(dtype):
    with pytest.raises(TypeError, match="`dtype` must be float32 or float64"):
        PerformanceFlags(dtype=dtype)


@pytest.mark.parametrize("dtype", [None, jnp.float32, np.float64, "float32"])
def test_flags_take_wide_types(dtype):
    assert PerformanceFlags(dtype=dtype).dtype is dtype


# Clip norms are those that the noise was made for.


def clipped_norms(plan):
    """Returns what is left of a large gradient in each layer."""
    params = {"w": jnp.zeros(2), "rest": [jnp.zeros(2), {"b": jnp.zeros(2)}]}

    def loss(p, x):
        return jnp.sum(x * (p["w"] + p["rest"][0] + p["rest"][1]["b"]))

    total = plan.clipped_grad(loss)(params, jnp.full((1, 2), 1e4))
    layers = (total["w"], total["rest"][0], total["rest"][1]["b"])
    return [float(jnp.linalg.norm(layer)) for layer in layers]


def test_clip_norms_cannot_be_changed_after_the_noise_was_made():
    given = copy.deepcopy(LAYERS)
    config = layered(given)
    plan = config.make()
    for norms in (given, config.l2_clip_norm, plan.config.l2_clip_norm):
        norms["w"] = 1e3
        norms["rest"][0] = 1e3
        norms["rest"][1]["b"] = 1e3
    np.testing.assert_allclose(clipped_norms(plan), [3.0, 4.0, 12.0], rtol=1e-5)
    assert config.l2_clip_norm == LAYERS
    assert config.sensitivity() == pytest.approx(13.0)


def test_clip_norms_of_layers_are_saved_copied_and_compared():
    config = layered()
    saved = config_to_dict(config)
    assert config_from_dict(json.loads(json.dumps(saved))) == config
    saved["l2_clip_norm"]["w"] = 1e3
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), layered()):
        assert twin == config
        assert twin.l2_clip_norm == LAYERS
    assert config != layered({**LAYERS, "w": 1.0})
    assert "l2_clip_norm={'w': 3.0" in repr(config)


def test_the_clip_norm_is_1_by_default():
    assert (POISSON.l2_clip_norm, DPSGDConfig.l2_clip_norm) == (1.0, 1.0)


@pytest.mark.parametrize("norms", [(1.0, 2.0), {"w": (1.0,)}, {0: 1.0}, {"w": None}, "1"])
def test_clip_norms_that_no_file_holds_are_refused(norms):
    with pytest.raises(TypeError, match="`l2_clip_norm` must be a"):
        layered(norms)


@pytest.mark.parametrize("norms", [{}, [], {"w": []}])
def test_clip_norms_without_a_number_are_refused(norms):
    with pytest.raises(ValueError, match="`l2_clip_norm` must hold a number"):
        layered(norms)


# Files that are damaged.


@pytest.mark.parametrize(
    "change",
    [
        {"type": ["x"]},
        {"type": None},
        {"noise_multiplier": 10**400},
        {"l2_clip_norm": 10**400},
        {"sampling_prob": [0.5]},
        {"neighboring_relation": ["x"]},
    ],
)
def test_a_damaged_config_is_a_value_error(change):
    with pytest.raises(ValueError, match=r"."):
        config_from_dict({**config_to_dict(POISSON), **change})


@pytest.mark.parametrize("state", [None, 5, "DPSGDConfig", []])
def test_what_is_no_config_is_a_value_error(state):
    with pytest.raises(ValueError, match="`state` must be what `config_to_dict` returns"):
        config_from_dict(state)


def test_a_damaged_strategy_is_a_value_error():
    banded = banded_config((1.0, 0.5))
    with pytest.raises(ValueError, match=r"."):
        config_from_dict({**config_to_dict(banded), "strategy": [1.0, 10**400]})


# Strategies whose noise does not stay bounded.


def banded_config(strategy, iterations=300):
    return BandMFConfig(
        iterations=iterations,
        expected_participations=1.0,
        strategy=strategy,
        noise_multiplier=1.0,
    )


@pytest.mark.parametrize(
    "strategy", [(1.0, 3.0, 3.0), (1e-30, 1.0), (1e-320, 1.0), (1.0, -2.0), (1.0, 1.2)]
)
def test_a_strategy_whose_noise_explodes_is_refused(strategy):
    with pytest.raises(ValueError, match="`strategy` must have an inverse that stays bounded"):
        banded_config(strategy)


@pytest.mark.parametrize("strategy", [(1.0,), (1.0, -1.0), (1.0, 1.0), (1.0, 0.5, 0.375)])
def test_a_strategy_whose_noise_grows_slowly_is_taken(strategy):
    assert banded_config(strategy).strategy == strategy


def test_a_strategy_may_grow_for_as_long_as_there_are_few_steps():
    # 1.2 to the power of 50 is 9,100: finite, if of no use.
    assert banded_config((1.0, 1.2), iterations=50).num_bands == 2


@pytest.mark.slow
def test_growth_is_that_of_the_noise():
    # Rows of the inverse of (1, -1) are all ones: after 300 steps sqrt(300) times the first.
    zeros = jnp.zeros(20_000)
    plan = banded_config((1.0, -1.0)).make(PerformanceFlags(noise_seed=0))
    state, stds = plan.noise_addition_transform.init(zeros), []
    for _ in range(9):
        noise, state = plan.noise_addition_transform.update(zeros, state)
        stds.append(float(jnp.std(noise)))
    # 20,000 draws: 7 deviations are 3.5 %; each row's growth is off by far more if misread.
    np.testing.assert_allclose(np.array(stds) / stds[0], np.sqrt(np.arange(1, 10)), rtol=0.05)


def test_integers_beyond_all_floats_are_out_of_range():
    with pytest.raises(ValueError, match="`noise_multiplier` must be non-negative and finite"):
        DPSGDConfig(iterations=1, sampling_prob=0.5, noise_multiplier=10**400)
