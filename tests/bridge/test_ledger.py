import copy
import io
import math
import pickle
import time
from collections.abc import Callable
from typing import Any

import dp_accounting
import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from dpbridge import accounting
from dpbridge.ledger import Ledger

STEPS = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0, 2.5]), st.sampled_from([None, 0.1, 1.0])), max_size=12
)


def recorded(*runs: tuple[float, float | None, int]) -> Ledger:
    ledger = Ledger()
    for noise_multiplier, sampling_prob, steps in runs:
        for _ in range(steps):
            ledger.record(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob)
    return ledger


def through_state_dict(ledger: Ledger) -> Ledger:
    restored = recorded((9.0, 0.9, 9))
    restored.load_state_dict(ledger.state_dict())
    return restored


def through_a_file(ledger: Ledger) -> Ledger:
    file = io.BytesIO()
    torch.save(ledger.state_dict(), file)
    file.seek(0)
    restored = Ledger()
    restored.load_state_dict(torch.load(file, weights_only=True))
    return restored


COPIES: list[Callable[[Ledger], Ledger]] = [
    copy.deepcopy,
    lambda ledger: pickle.loads(pickle.dumps(ledger)),
    through_state_dict,
    through_a_file,
]


def test_ledger_epsilon_of_nothing_is_zero() -> None:
    assert Ledger().epsilon(1e-5) == 0.0


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_ledger_epsilon_equals_compute_epsilon(accountant: str) -> None:
    expected = accounting.compute_epsilon(
        noise_multiplier=3.0, sampling_prob=0.1, steps=512, delta=1e-6, accountant=accountant
    )
    assert recorded((3.0, 0.1, 512)).epsilon(1e-6, accountant) == expected


def test_ledger_epsilon_within_a_calibrated_budget() -> None:
    noise_multiplier = accounting.calibrate_noise_multiplier(
        epsilon=2.0, delta=1e-5, sampling_prob=0.1, steps=300
    )
    assert recorded((noise_multiplier, 0.1, 300)).epsilon(1e-5) <= 2.0


def test_ledger_epsilon_composes_different_steps() -> None:
    ledger = recorded((3.0, 0.1, 10), (2.0, 1.0, 4), (3.0, 0.1, 20))
    events = [(accounting.Event(3.0, 0.1), 30), (accounting.Event(2.0, 1.0), 4)]
    assert ledger.epsilon(1e-6) == accounting.compose_epsilon(events, delta=1e-6)


def test_ledger_epsilon_counts_steps_recorded_after_the_last_call() -> None:
    ledger = recorded((3.0, 0.1, 10))
    before = ledger.epsilon(1e-6)
    ledger.record(noise_multiplier=3.0, sampling_prob=0.1)
    assert ledger.epsilon(1e-6) > before


def test_ledger_epsilon_without_noise_is_infinite() -> None:
    assert recorded((3.0, 0.1, 2), (0.0, 0.1, 1)).epsilon(1e-6) == math.inf


@pytest.mark.parametrize("noise_multiplier", [0.0, 2.0])
def test_ledger_epsilon_refuses_unknown_sampling(noise_multiplier: float) -> None:
    ledger = recorded((3.0, 0.1, 2), (noise_multiplier, None, 3))
    with pytest.raises(ValueError, match=r"`sampling_prob` must be known.*3 of 5 steps. Pass"):
        ledger.epsilon(1e-6)


@pytest.mark.parametrize(
    ("delta", "accountant", "message"),
    [(0.0, "pld", "`delta` must be in"), (1e-6, "prv", "one of 'pld', 'rdp'")],
)
def test_ledger_epsilon_refuses_bad_input_before_anything_is_recorded(
    delta: float, accountant: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Ledger().epsilon(delta, accountant)


def test_ledger_epsilon_again_is_free() -> None:
    ledger = recorded((3.0, 0.1, 100))
    ledger.epsilon(1e-6)
    start = time.perf_counter()
    for _ in range(1000):
        ledger.epsilon(1e-6)
    assert time.perf_counter() - start < 0.1


def test_ledger_epsilon_after_every_step_is_affordable() -> None:
    ledger, start = Ledger(), time.perf_counter()
    for _ in range(20):
        ledger.record(noise_multiplier=3.0, sampling_prob=0.02)
        ledger.epsilon(1e-5)
    assert time.perf_counter() - start < 5


@hypothesis.given(STEPS)
def test_ledger_steps_counts_records(steps: list[tuple[float, float | None]]) -> None:
    assert recorded(*((*step, 1) for step in steps)).steps == len(steps)


def test_ledger_repr_shows_steps() -> None:
    assert repr(recorded((3.0, 0.1, 7))) == "Ledger(steps=7)"


@pytest.mark.parametrize(
    ("noise_multiplier", "sampling_prob", "error", "name"),
    [
        (-1.0, 0.1, ValueError, "noise_multiplier"),
        (math.nan, 0.1, ValueError, "noise_multiplier"),
        (None, 0.1, TypeError, "noise_multiplier"),
        (1.0, 0.0, ValueError, "sampling_prob"),
        (1.0, 2.0, ValueError, "sampling_prob"),
        (1.0, "0.1", TypeError, "sampling_prob"),
    ],
)
def test_ledger_record_refuses_bad_input(
    noise_multiplier: Any, sampling_prob: Any, error: type[Exception], name: str
) -> None:
    with pytest.raises(error, match=f"`{name}` must be"):
        Ledger().record(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob)


def test_ledger_record_that_is_refused_is_not_counted() -> None:
    ledger = recorded((3.0, 0.1, 2))
    with pytest.raises(ValueError, match="sampling_prob"):
        ledger.record(noise_multiplier=1.0, sampling_prob=0.0)
    assert ledger.steps == 2


def test_ledger_events_are_those_of_dp_accounting() -> None:
    def event(noise_multiplier: float, sampling_prob: float, count: int) -> dp_accounting.DpEvent:
        gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
        poisson = dp_accounting.PoissonSampledDpEvent(sampling_prob, gaussian)
        return dp_accounting.SelfComposedDpEvent(poisson, count)

    expected = dp_accounting.ComposedDpEvent([event(3.0, 0.1, 2), event(2.0, 0.5, 1)])
    assert recorded((3.0, 0.1, 2), (2.0, 0.5, 1)).events == expected


def test_ledger_events_of_unknown_sampling_are_refused_by_accountants() -> None:
    accountant = dp_accounting.pld.PLDAccountant()
    assert not accountant.supports(recorded((3.0, None, 2)).events)


@pytest.mark.parametrize("copied", COPIES)
def test_ledger_copies_state_the_same_epsilon(copied: Callable[[Ledger], Ledger]) -> None:
    ledger = recorded((3.0, 0.1, 10), (2.0, 0.1, 5))
    assert copied(ledger).epsilon(1e-6) == ledger.epsilon(1e-6)


@pytest.mark.parametrize("copied", COPIES)
def test_ledger_copies_are_independent(copied: Callable[[Ledger], Ledger]) -> None:
    ledger = recorded((3.0, 0.1, 10))
    copied(ledger).record(noise_multiplier=3.0, sampling_prob=0.1)
    assert ledger.steps == 10


@hypothesis.given(before=STEPS, after=STEPS)
def test_ledger_state_dict_restores_the_record(
    before: list[tuple[float, float | None]], after: list[tuple[float, float | None]]
) -> None:
    uninterrupted = recorded(*((*step, 1) for step in before + after))
    resumed = through_a_file(recorded(*((*step, 1) for step in before)))
    for noise_multiplier, sampling_prob in after:
        resumed.record(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob)
    assert resumed.state_dict() == uninterrupted.state_dict()


def test_ledger_state_dict_is_small() -> None:
    assert len(str(recorded((3.0, 0.1, 5000)).state_dict())) < 100


RUN = [3.0, 0.1, 2]
BAD_STATES = [
    (None, "`state` must have the keys"),
    ({}, "`state` must have the keys"),
    ({"version": 1}, "`state` must have the keys"),
    ({"version": 1, "runs": [], "more": 0}, "`state` must have the keys"),
    ({"version": 2, "runs": []}, r"`state\['version'\]` must be 1, got 2"),
    ({"version": 1, "runs": {}}, r"`state\['runs'\]` must be a list"),
    ({"version": 1, "runs": [RUN, [3.0, 0.1]]}, r"`state\['runs'\]\[1\]` must be"),
    ({"version": 1, "runs": [RUN, 3.0]}, r"`state\['runs'\]\[1\]` must be"),
    ({"version": 1, "runs": [[-1.0, 0.1, 2]]}, r"\[0\].noise_multiplier` must be non-negative"),
    ({"version": 1, "runs": [["3", 0.1, 2]]}, r"\[0\].noise_multiplier` must be a real number"),
    ({"version": 1, "runs": [[3.0, 1.1, 2]]}, r"\[0\].sampling_prob` must be in"),
    ({"version": 1, "runs": [RUN, [3.0, 0.1, 0]]}, r"\[1\].steps` must be at least 1"),
    ({"version": 1, "runs": [[3.0, 0.1, -5]]}, r"\[0\].steps` must be at least 1"),
    ({"version": 1, "runs": [[3.0, 0.1, 2.0]]}, r"\[0\].steps` must be an integer"),
    ({"version": 1, "runs": [[3.0, 0.1, True]]}, r"\[0\].steps` must be an integer"),
]


@pytest.mark.parametrize(("state", "message"), BAD_STATES)
def test_ledger_load_state_dict_names_the_bad_part(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ledger().load_state_dict(state)


@pytest.mark.parametrize("state", [state for state, _ in BAD_STATES])
def test_ledger_load_state_dict_that_is_refused_changes_nothing(state: Any) -> None:
    ledger = recorded((3.0, 0.1, 7))
    before = ledger.state_dict()
    with pytest.raises(ValueError, match="must"):
        ledger.load_state_dict(state)
    assert ledger.state_dict() == before
