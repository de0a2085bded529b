"""The training loop: what it computes, where it stops, how it resumes, what it refuses."""

import dataclasses
from collections.abc import Iterator

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from dpkernels import accounting
from dpkernels.batch_selection import (
    BatchSelectionStrategy,
    CyclicPoissonSampling,
    FixedBatchSampling,
    PartitionType,
)
from dpkernels.execution_plan import (
    BandMFConfig,
    DPSGDConfig,
    NonPrivateConfig,
    PerformanceFlags,
)
from dpkernels.optimizers import scale_then_privatize
from dpkernels.training import TrainingState, train
from dpkernels.training.rows import check_size
from dpkernels.training.step import takes_prng

SIZE, FEATURES, CLIP, NORMALIZE_BY = 24, 3, 0.7, 4.0
_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(SIZE, FEATURES)).astype(np.float32)
Y = (X @ np.array([1.0, -2.0, 0.5]) + 0.3 * _RNG.normal(size=SIZE)).astype(np.float32)
DATA = {"x": X, "y": Y}
PARAMS = {"w": np.full(FEATURES, 0.1, np.float32), "b": np.float32(0.2)}


def loss(params, batch):
    residual = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return jnp.mean(jnp.square(residual))


def noisy_loss(params, batch, prng):
    kept = jax.random.bernoulli(prng, 0.5, batch["x"].shape)
    return loss(params, {"x": jnp.where(kept, batch["x"], 0), "y": batch["y"]})


def make_plan(iterations=4, *, noise_multiplier=0.0, sampling_prob=0.15, noise_seed=0, **flags):
    config = DPSGDConfig(
        iterations=iterations,
        sampling_prob=sampling_prob,
        noise_multiplier=noise_multiplier,
        l2_clip_norm=CLIP,
        normalize_by=NORMALIZE_BY,
    )
    # What compiles fastest, in tests that are about neither clipping nor noise.
    flags = {"strategy": "materialize", **flags}
    plan = config.make(PerformanceFlags(noise_seed=noise_seed, **flags))
    if noise_multiplier:
        return plan
    return dataclasses.replace(plan, noise_addition_transform=optax.identity(), config=None)


def run(plan=None, *, dataset=DATA, loss_fn=loss, params=PARAMS, optimizer=None, **options):
    options = {"padding_multiple": SIZE, "rng": 0, **options}
    optimizer = optax.sgd(0.5) if optimizer is None else optimizer
    return train(
        make_plan() if plan is None else plan, dataset, loss_fn, params, optimizer, **options
    )


def draws_of(plan, seed=0):
    return [
        np.asarray(draw, int) for draw in plan.batch_selection_strategy.batch_iterator(SIZE, seed)
    ]


def gradients(params, draw):
    """Per-example gradients by hand, float64: (batch, features + 1), the intercept last."""
    x, y = X[draw].astype(np.float64), Y[draw].astype(np.float64)
    residual = x @ params[:-1] + params[-1] - y
    return 2 * residual[:, None] * np.column_stack([x, np.ones(len(x))])


def clipped_sum(rows, bound=CLIP):
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows * np.minimum(1, bound / norms)).sum(0)


def flat(params):
    return np.append(params["w"], params["b"]).astype(np.float64)


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual.params, expected.params)
    jax.tree.map(np.testing.assert_array_equal, actual.opt_state, expected.opt_state)
    assert (actual.step, actual.draws) == (expected.step, expected.draws)


def copied(state):
    return jax.tree.map(jnp.copy, state)


# What is computed.


@pytest.mark.parametrize("noise_multiplier", [0.0, 1.5])
def test_steps_are_those_of_dp_sgd(noise_multiplier):
    plan = make_plan(6, noise_multiplier=noise_multiplier, sampling_prob=0.08, strategy="auto")
    draws = draws_of(plan)
    assert [] in [draw.tolist() for draw in draws]
    assert max(map(len, draws)) > 1
    noise = plan.noise_addition_transform
    noise_state, params = noise.init(PARAMS), flat(PARAMS)
    for draw in draws:
        drawn, noise_state = noise.update(jax.tree.map(jnp.zeros_like, PARAMS), noise_state)
        noised = clipped_sum(gradients(params, draw)) / NORMALIZE_BY + flat(drawn)
        params = params - 0.5 * noised
    state = run(plan, padding_multiple=8)
    assert state.step == 6
    np.testing.assert_allclose(flat(state.params), params, rtol=1e-5)


def test_an_empty_draw_is_a_step_of_noise_alone():
    plan = make_plan(1, noise_multiplier=2.0, sampling_prob=1e-9)
    big = np.zeros(100_000, np.float32)

    def linear(w, x):
        return jnp.sum(w) * jnp.sum(x)

    state = run(plan, dataset=X, loss_fn=linear, params=big, optimizer=optax.sgd(1.0))
    scale = 2.0 * CLIP / NORMALIZE_BY
    # With so many draws a scale that is 3 % off is refused.
    assert stats.kstest(state.params, stats.norm(scale=scale).cdf).pvalue > 1e-6
    assert stats.kstest(state.params, stats.norm(scale=1.03 * scale).cdf).pvalue < 1e-4


def test_neighbours_move_a_step_by_no_more_than_the_clip_norm():
    plan = make_plan(1, sampling_prob=1.0)
    dataset = {"x": X.copy(), "y": Y.copy()}
    dataset["x"][3], dataset["y"][3] = 1e12, -1e15
    moved = flat(run(plan, dataset=dataset).params) - flat(run(plan).params)
    assert np.linalg.norm(moved) <= 0.5 * 2 * CLIP / NORMALIZE_BY * (1 + 1e-5)
    assert np.linalg.norm(moved) > 0


@pytest.mark.slow
def test_padding_changes_nothing():
    plan = make_plan(2, sampling_prob=0.2)
    states = [run(plan, loss_fn=noisy_loss, padding_multiple=multiple) for multiple in (1, 5, 24)]
    for state in states[1:]:
        np.testing.assert_allclose(flat(state.params), flat(states[0].params), rtol=1e-5)
        assert state.draws == states[0].draws


def test_padding_may_be_outside_the_domain_of_the_loss():
    def log_loss(w, x):
        return jnp.sum(w * jnp.log(jnp.abs(x)))  # Of zeros: infinite.

    plan, seen = make_plan(2), []
    state = run(
        plan,
        dataset=X,
        loss_fn=log_loss,
        params=np.ones(FEATURES, np.float32),
        callback=lambda step, state, aux: seen.append(aux),
    )
    assert jnp.isfinite(state.params).all()
    assert all(np.isfinite(aux.values).all() for aux in seen)


def test_microbatches_change_nothing():
    whole, parts = run(), run(make_plan(microbatch_size=5))
    np.testing.assert_allclose(flat(parts.params), flat(whole.params), rtol=1e-5)


def test_a_dataset_of_jax_arrays_is_the_same():
    plan = make_plan(2)
    assert_same(run(plan, dataset=jax.tree.map(jnp.asarray, DATA)), run(plan))


def test_examples_may_come_without_a_batch_axis():
    def loss_of_one(params, example):
        assert example["x"].shape == (FEATURES,)
        return jnp.square(example["x"] @ params["w"] + params["b"] - example["y"])

    plan = make_plan(keep_batch_dim=False)
    np.testing.assert_allclose(
        flat(run(plan, loss_fn=loss_of_one).params), flat(run().params), rtol=1e-5
    )


def test_a_plan_without_privacy_trains():
    plan = NonPrivateConfig(iterations=3, batch_size=5).make()
    params = flat(PARAMS)
    for draw in draws_of(plan):
        params = params - 0.1 * gradients(params, draw).mean(0)
    state = run(plan, optimizer=optax.sgd(0.1))
    np.testing.assert_allclose(flat(state.params), params, rtol=1e-5)


@pytest.mark.slow
def test_correlated_noise_is_carried_from_step_to_step():
    config = BandMFConfig(
        iterations=4, expected_participations=1e-9, strategy=(1.0, 0.5), noise_multiplier=1.0
    )
    plan = config.make(PerformanceFlags(noise_seed=0))
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    state, total = plan.noise_addition_transform.init(zeros), 0.0
    for _ in range(4):
        drawn, state = plan.noise_addition_transform.update(zeros, state)
        total = total + flat(drawn)
    trained = run(plan, optimizer=optax.sgd(1.0))
    np.testing.assert_allclose(flat(trained.params) - flat(PARAMS), -total, rtol=1e-5)


def test_scale_then_privatize_clips_in_the_optimizers_geometry():
    rate, decay, eps = 0.1, 0.9, 0.05
    base = optax.chain(optax.clip(100.0), optax.rmsprop(rate, decay=decay, eps=1e-4))
    plan = make_plan(5, sampling_prob=0.3)
    params, v = flat(PARAMS), np.zeros(FEATURES + 1)
    for draw in draws_of(plan):
        s = 1 / (np.sqrt(v) + eps)
        released = clipped_sum(gradients(params, draw) * s) / NORMALIZE_BY / s
        v = decay * v + (1 - decay) * released**2
        params = params - rate * released / np.sqrt(v + 1e-4)
    state = run(plan, optimizer=scale_then_privatize(base, eps=eps))
    np.testing.assert_allclose(flat(state.params), params, rtol=1e-4)
    # Clipped in their own geometry they go elsewhere: the test above would see it.
    plain = run(plan, optimizer=base)
    assert np.abs(flat(plain.params) - params).max() > 1e-2


# Types.


def spy():
    """Plain gradient descent that keeps the last gradient it was given."""

    def update(updates, state, params):
        del state
        steps = jax.tree.map(lambda grad, param: (-0.5 * grad).astype(param.dtype), updates, params)
        return steps, updates

    return optax.GradientTransformation(lambda params: params, update)


def test_parameters_in_half_precision_are_summed_and_noised_in_float32():
    dtype = jnp.bfloat16
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), PARAMS)
    dataset = jax.tree.map(lambda leaf: leaf.astype(dtype), DATA)
    plan = make_plan(2, noise_multiplier=1.0)
    state = run(plan, dataset=dataset, params=params, optimizer=spy())
    grad = state.opt_state
    assert {leaf.dtype for leaf in jax.tree.leaves(grad)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(dtype)}
    assert np.all(grad["w"] != grad["w"].astype(dtype).astype(jnp.float32))


def test_sums_in_float64_step_parameters_in_float32():
    with jax.enable_x64(True):
        state = run(make_plan(2, noise_multiplier=1.0, dtype=jnp.float64), optimizer=spy())
    assert {leaf.dtype for leaf in jax.tree.leaves(state[1:3])} == {jnp.dtype(jnp.float32)}


# Losses and callbacks.


def test_aux_holds_the_rows_of_the_examples_drawn():
    def loss_with_aux(params, batch):
        return loss(params, batch), {"twice": 2 * batch["x"], "y": batch["y"]}

    seen, plan = [], make_plan(3, sampling_prob=0.1)
    run(plan, loss_fn=loss_with_aux, callback=lambda step, state, aux: seen.append((step, aux)))
    assert [step for step, _ in seen] == [1, 2, 3]
    draws = draws_of(plan)
    for draw, (_, aux) in zip(draws, seen, strict=True):
        np.testing.assert_array_equal(aux.aux["twice"].reshape(-1, FEATURES), 2 * X[draw])
        np.testing.assert_array_equal(aux.aux["y"], Y[draw])
    first = next(i for i, draw in enumerate(draws) if len(draw))  # Still at the start.
    expected = gradients(flat(PARAMS), draws[first])
    np.testing.assert_allclose(seen[first][1].values, expected[:, -1] ** 2 / 4, rtol=1e-5)
    np.testing.assert_allclose(
        seen[first][1].grad_norms, np.linalg.norm(expected, axis=1), rtol=1e-5
    )


def test_a_callback_stops_the_run():
    state = run(make_plan(9), callback=lambda step, state, aux: step == 2)
    assert_same(state, run(make_plan(2)))


def test_a_loss_may_take_a_key_that_differs_between_steps_and_examples():
    def drawn(w, x, prng):
        return jnp.sum(w * x), jax.random.uniform(prng)

    seen = []
    run(
        make_plan(3, sampling_prob=1.0),
        dataset=X,
        loss_fn=drawn,
        params=np.zeros(FEATURES, np.float32),
        callback=lambda step, state, aux: seen.append(aux.aux),
    )
    assert len(np.unique(np.concatenate(seen))) == 3 * SIZE


@pytest.mark.parametrize(
    ("loss_fn", "has_prng"),
    [
        (lambda params, batch: 0, False),
        (lambda params, batch, prng: 0, True),
        (lambda params, batch, anything: 0, True),
        (lambda params, batch, prng=None: 0, True),
        (lambda params, batch, *, scale=1.0: 0, False),
        (jax.jit(lambda params, batch, key: 0), True),
    ],
)
def test_the_arguments_of_a_loss_say_whether_it_takes_a_key(loss_fn, has_prng):
    assert takes_prng(loss_fn) is has_prng


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda params: 0,
        lambda params, batch, prng, more: 0,
        lambda params, batch, temperature=1.0: 0,
        lambda params, batch, *, scale: 0,
        lambda *args: 0,
    ],
)
def test_a_loss_of_other_arguments_is_refused(loss_fn):
    with pytest.raises(TypeError, match="`loss_fn` must take"):
        run(loss_fn=loss_fn)


def test_a_loss_that_returns_three_is_refused():
    with pytest.raises(TypeError, match="`loss_fn` must return a scalar or"):
        run(loss_fn=lambda params, batch: (loss(params, batch), 1, 2))


# Randomness and resumption.


def test_a_resumed_run_continues_exactly():
    plan = make_plan(3, noise_multiplier=1.0)
    states = []
    options = {"loss_fn": noisy_loss, "optimizer": optax.sgd(0.1, momentum=0.9)}
    whole = run(plan, **options, callback=lambda step, state, aux: states.append(copied(state)))
    for state in states:
        assert_same(run(plan, params=state, **options), whole)


def test_a_resumed_run_may_go_through_numpy_and_a_generator():
    plan = make_plan(3, noise_multiplier=1.0, noise_seed=None)
    states = []
    whole = run(plan, callback=lambda step, state, aux: states.append(copied(state)))
    saved = jax.tree.map(np.asarray, states[0]._replace(noise_state=None))
    saved = saved._replace(noise_state=states[0].noise_state)
    assert_same(run(plan, params=saved, rng=np.random.default_rng(0)), whole)


def test_a_run_resumed_with_other_draws_is_refused():
    plan = make_plan(4)
    state = run(plan, callback=lambda step, state, aux: step == 2)
    with pytest.raises(ValueError, match="`rng` must draw the same examples"):
        run(plan, params=state, rng=1)
    twice = {name: np.concatenate([array, array]) for name, array in DATA.items()}
    with pytest.raises(ValueError, match="`rng` must draw the same examples"):
        run(plan, params=state, dataset=twice)


@pytest.mark.parametrize(
    "change", [{"noise_multiplier": 5.0}, {"sampling_prob": 0.2}, {"iterations": 5}]
)
def test_a_run_resumed_with_another_plan_is_refused(change):
    # Its epsilon would be stated for the steps of the first plan too.
    usual = {"iterations": 4, "noise_multiplier": 0.1}
    state = run(make_plan(**usual), callback=lambda step, state, aux: step == 3)
    with pytest.raises(ValueError, match=r"`params.plan` must be .* the checksum of `plan`"):
        run(make_plan(**(usual | change)), params=state)
    with pytest.raises(ValueError, match=r"`params.plan` must be .* got None"):
        run(make_plan(**usual), params=state._replace(plan=None))


def test_a_run_resumed_with_another_event_by_hand_is_refused():
    plan = dataclasses.replace(make_plan(2, noise_multiplier=0.1), config=None)
    other = dataclasses.replace(plan, dp_event=make_plan(2, noise_multiplier=5.0).dp_event)
    state = run(plan, callback=lambda step, state, aux: True)
    with pytest.raises(ValueError, match=r"`params.plan` must be"):
        run(other, params=state)


def test_a_run_may_be_resumed_with_a_plan_made_again():
    plans = [make_plan(2, noise_multiplier=1.0) for _ in range(2)]
    state = run(plans[0], callback=lambda step, state, aux: True)
    assert_same(run(plans[1], params=state), run(plans[0]))


def test_a_run_resumed_without_a_seed_is_refused():
    state = run(callback=lambda step, state, aux: True)
    with pytest.raises(ValueError, match="`rng` must be given to resume"):
        run(params=state, rng=None)


def test_there_is_no_step_past_the_last():
    plan = make_plan(2)
    state = run(plan)
    assert_same(run(plan, params=copied(state)), state)
    with pytest.raises(ValueError, match="at most the plan's 1 iterations, got 2"):
        run(make_plan(1), params=state)


def test_the_seed_decides_the_draws_and_the_operating_system_otherwise():
    plan = make_plan(1, sampling_prob=0.5)
    draws = [run(plan, rng=rng).draws for rng in (0, 0, None, None)]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_two_runs_of_one_plan_have_their_own_noise():
    plan = make_plan(1, noise_multiplier=1.0, noise_seed=None)
    assert np.all(flat(run(plan).params) != flat(run(plan).params))


# Memory.


def test_what_is_passed_in_is_left_alone():
    params, plan = jax.tree.map(jnp.asarray, PARAMS), make_plan(2)
    first = run(plan, params=params)
    state = run(plan, params=params, callback=lambda step, state, aux: True)
    run(plan, params=state)
    assert_same(run(plan, params=state), first)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, state[1:4])))


def test_a_step_compiles_once_for_each_padded_size():
    traces = []

    def counted(params, batch):
        traces.append(batch["x"].shape)
        return loss(params, batch)

    plan = make_plan(6, sampling_prob=0.05)
    assert {bool(len(draw)) for draw in draws_of(plan)} == {False, True}  # An empty one too.
    run(plan, loss_fn=counted)
    often = len(traces)
    run(make_plan(1, sampling_prob=0.05), loss_fn=counted)
    assert often == len(traces) - often


# What is refused.


@dataclasses.dataclass(frozen=True)
class Scripted(BatchSelectionStrategy):
    """Yields what it is told."""

    batches: tuple
    iterations: int

    def batch_iterator(self, num_examples, rng=None) -> Iterator[np.ndarray]:
        yield from map(np.asarray, self.batches)


def scripted(*batches, iterations=2):
    return dataclasses.replace(
        make_plan(2), batch_selection_strategy=Scripted(batches, iterations), config=None
    )


@pytest.mark.parametrize(("batches", "count"), [(1, "1"), (3, "3 or more"), (0, "0")])
def test_more_or_fewer_batches_than_accounted_are_an_error(batches, count):
    with pytest.raises(RuntimeError, match=f"must draw 2 batches.* got {count}"):
        run(scripted(*[[0, 1]] * batches))


@pytest.mark.parametrize("batch", [[0, SIZE], [-2], [0.5], [True]])
def test_indices_outside_the_dataset_are_an_error(batch):
    with pytest.raises(RuntimeError, match=f"integers from -1 .padding. to {SIZE - 1}"):
        run(scripted(batch, [0]))


def test_indices_may_be_narrow_padded_or_of_no_type_when_empty():
    batches = (np.array([3, -1, 4], np.int8), np.zeros(0))
    expected = run(scripted([3, 4], []))
    np.testing.assert_array_equal(flat(run(scripted(*batches)).params), flat(expected.params))


@pytest.mark.parametrize(
    "strategy", [Scripted(((5, 3, -1, 5, -1),), 1), FixedBatchSampling(SIZE, 1, replace=True)]
)
def test_an_example_twice_in_a_batch_is_an_error(strategy):
    # It would move the sum by twice the clip norm.
    plan = dataclasses.replace(make_plan(1), batch_selection_strategy=strategy)
    with pytest.raises(RuntimeError, match="must draw an example at most once in a batch, got"):
        run(plan)


def test_without_privacy_examples_may_repeat():
    plan = dataclasses.replace(
        NonPrivateConfig(iterations=1, batch_size=2).make(),
        batch_selection_strategy=Scripted(((3, 3),), 1),
    )
    expected = -0.5 * gradients(flat(PARAMS), [3])[0]
    np.testing.assert_allclose(flat(run(plan).params) - flat(PARAMS), expected, rtol=1e-5)


def test_batches_of_users_are_refused():
    with pytest.raises(NotImplementedError, match="Batches of users"):
        run(scripted([[0, 1], [2, 3]], [0]))


def test_a_dataset_of_another_size_than_accounted_is_refused():
    config = DPSGDConfig(iterations=2, batch_size=4, num_examples=SIZE + 1, noise_multiplier=1.0)
    with pytest.raises(ValueError, match=f"must hold the {SIZE + 1} examples .* got {SIZE}"):
        run(config.make())


def by_hand(event, strategy):
    return dataclasses.replace(make_plan(2), batch_selection_strategy=strategy, dp_event=event)


def sizes_accounted(size, cycle_length=1, **options):
    """A plan by hand whose event is truncated, of groups of a size."""
    event = accounting.truncated_dpsgd_event(
        1.0, 2, sampling_prob=0.5, num_examples=size, truncated_batch_size=4
    )
    strategy = CyclicPoissonSampling(
        0.5, 2, truncated_batch_size=4, cycle_length=cycle_length, **options
    )
    return by_hand(dp_accounting.ComposedDpEvent([event]), strategy)


def fixed_accounted(size, **options):
    event = accounting.fixed_dpsgd_event(1.0, 2, dataset_size=size, batch_size=4, **options)
    return by_hand(event, FixedBatchSampling(4, 2))


@pytest.mark.parametrize(
    ("plan", "accounted", "actual"),
    [
        (fixed_accounted(10_000), 10_000, SIZE),
        (fixed_accounted(10_000, replace=True), 10_000, SIZE),
        (sizes_accounted(SIZE - 1), SIZE - 1, SIZE),
        (sizes_accounted(SIZE, 3), SIZE, SIZE // 3),
    ],
)
def test_a_dataset_of_another_size_than_the_events_is_refused(plan, accounted, actual):
    with pytest.raises(ValueError, match=f"must hold the {accounted} examples .* got {actual}"):
        run(plan)


@pytest.mark.parametrize(
    "plan",
    [
        fixed_accounted(SIZE),
        sizes_accounted(SIZE),
        sizes_accounted(SIZE // 5, 5),
        sizes_accounted(9, 5, partition_type=PartitionType.INDEPENDENT),
        BandMFConfig(
            iterations=2,
            expected_participations=1.0,
            strategy=(1.0, 0.5),
            num_examples=SIZE - 1,
            truncated_batch_size=4,
            noise_multiplier=1.0,
        ).make(),
    ],
)
def test_a_dataset_of_the_size_of_the_event_is_taken(plan):
    check_size(plan, getattr(plan.config, "num_examples", SIZE))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({}, "same number of examples on axis 0"),
        ({"x": X, "y": Y[:-1]}, "same number of examples on axis 0"),
        ({"x": X, "y": np.float32(1)}, "same number of examples on axis 0"),
        ({"x": X[:0], "y": Y[:0]}, "must hold examples, got none"),
    ],
)
def test_a_dataset_is_refused(dataset, message):
    with pytest.raises(ValueError, match=message):
        run(dataset=dataset)


def test_parameters_that_cannot_be_trained_are_refused():
    with pytest.raises(TypeError, match=r"`params\['steps'\]` must be of a floating-point type"):
        run(params={**PARAMS, "steps": np.int32(3)})
    with pytest.raises(ValueError, match="`params` must hold arrays"):
        run(params={})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"padding_multiple": 0}, ValueError, "`padding_multiple` must be at least 1"),
        ({"rng": -1}, ValueError, "`rng` must be at least 0"),
        ({"rng": np.random.RandomState(0)}, TypeError, "`rng` must be an integer"),
        ({"optimizer": "sgd"}, TypeError, "`optimizer` must be an optax gradient"),
    ],
)
def test_an_argument_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        run(**options)


def test_the_state_says_what_was_spent():
    state = run(callback=lambda step, state, aux: step == 3)
    assert isinstance(state, TrainingState)
    plan = make_plan(noise_multiplier=1.0)
    assert plan.epsilon(1e-5, steps=state.step) == make_plan(3, noise_multiplier=1.0).epsilon(1e-5)
