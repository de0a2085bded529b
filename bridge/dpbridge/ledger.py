"""The record of what a training run has released, and the epsilon it adds up to.

Example:
    >>> ledger = Ledger()
    >>> for _ in range(512):
    ...     ledger.record(noise_multiplier=3.0, sampling_prob=0.1)
    >>> ledger.steps
    512
    >>> round(ledger.epsilon(delta=1e-6), 2)
    3.77
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import dp_accounting

from dpbridge import accounting
from dpkernels import _validate


class _Run(NamedTuple):
    """Equal steps in a row."""

    noise_multiplier: float
    sampling_prob: float | None
    steps: int

    def to_dp_event(self) -> dp_accounting.DpEvent:
        if self.sampling_prob is None:
            return dp_accounting.UnsupportedDpEvent()
        return accounting.Event(self.noise_multiplier, self.sampling_prob).to_dp_event()


class Ledger:
    """Records noisy steps in the order in which they are released.

    One entry is one Poisson-subsampled Gaussian mechanism (Abadi et al. 2016, Algorithm 1).
    Equal entries in a row are stored as one, so the ledger of a whole training run is a few
    numbers.

    Guarantees:
        * `epsilon` equals `accounting.compute_epsilon` of the same steps, whether they were
          recorded here or restored from a `state_dict`.
        * Where the sampling of any step is not known, no epsilon is stated.
        * `load_state_dict` either restores the whole record or changes nothing.
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self._steps = 0
        self._answers: dict[tuple[float, str], float] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(steps={self._steps})"

    @property
    def steps(self) -> int:
        """How many steps were recorded."""
        return self._steps

    @property
    def unknown_steps(self) -> int:
        """How many steps were recorded without a sampling probability."""
        return sum(run.steps for run in self._runs if run.sampling_prob is None)

    @property
    def events(self) -> dp_accounting.DpEvent:
        """The record in the words of dp_accounting, for any of its accountants.

        A step of unknown sampling is an `UnsupportedDpEvent`, which they all refuse.
        """
        return dp_accounting.ComposedDpEvent(
            [dp_accounting.SelfComposedDpEvent(run.to_dp_event(), run.steps) for run in self._runs]
        )

    @property
    def last(self) -> tuple[float, float | None]:
        """Noise multiplier and sampling probability of the step that was recorded last.

        Raises:
            IndexError: If there is none.
        """
        return self._runs[-1][:2]

    def record(self, *, noise_multiplier: float, sampling_prob: float | None) -> None:
        """Appends one step; call it before anything of the step is released.

        Args:
            noise_multiplier: Standard deviation of the noise over the sensitivity, 0 or more.
            sampling_prob: Probability with which each example was in the batch, in (0, 1], or
                None where it is not known.

        Raises:
            ValueError: If an argument is outside its range.
            TypeError: If an argument is not a number.
        """
        run = _checked_run("", noise_multiplier, sampling_prob, 1)
        if self._runs and self._runs[-1][:2] == run[:2]:
            self._runs[-1] = run._replace(steps=self._runs[-1].steps + 1)
        else:
            self._runs.append(run)
        self._steps += 1
        self._answers.clear()

    def epsilon(self, delta: float, accountant: str = "pld") -> float:
        """Returns the epsilon spent so far.

        Asking again with nothing recorded in between is free. Otherwise it takes some hundredths
        of a second to a few tenths for each kind of step, however many there were: show it in a
        progress bar every now and then, not after every step of some milliseconds.

        Args:
            delta: The delta of (epsilon, delta)-differential privacy, in (0, 1).
            accountant: `"pld"` or `"rdp"`, as in `accounting.compute_epsilon`.

        Returns:
            The epsilon; 0.0 if nothing was recorded and `math.inf` if a step had no noise.

        Raises:
            ValueError: If the sampling of any step is not known, `delta` is outside its range
                or the accountant is not known.
            TypeError: If `delta` is not a number.
        """
        key = (delta, accountant)
        if key not in self._answers:
            self._answers[key] = accounting.compose_epsilon(
                self._counted_events(), delta=delta, accountant=accountant
            )
        return self._answers[key]

    def epsilon_after(
        self,
        steps: int,
        *,
        noise_multiplier: float,
        sampling_prob: float | None,
        delta: float,
        accountant: str = "pld",
    ) -> float:
        """Returns the epsilon once so many steps of one kind are added to what was recorded.

        Args:
            steps: How many, 0 or more.
            noise_multiplier: As in `record`.
            sampling_prob: As in `record`.
            delta: As in `epsilon`.
            accountant: As in `epsilon`.

        Raises:
            ValueError: As `record` and `epsilon`.
            TypeError: If an argument is not a number.
        """
        ahead = Ledger()
        ahead._runs = list(self._runs)
        steps = _validate.integer("steps", steps, "Pass how many are to come.", minimum=0)
        if steps:
            ahead._runs.append(_checked_run("", noise_multiplier, sampling_prob, steps))
        return ahead.epsilon(delta, accountant)

    def _counted_events(self) -> list[tuple[accounting.Event, int]]:
        unknown = self.unknown_steps
        if unknown:
            raise ValueError(
                f"`sampling_prob` must be known for every step to state an epsilon, got None for "
                f"{unknown} of {self._steps} steps. Pass sampling_prob where the optimizer is "
                f"made, equal to that of the loader."
            )
        return [
            (accounting.Event(run.noise_multiplier, run.sampling_prob), run.steps)
            for run in self._runs
            if run.sampling_prob is not None
        ]

    def state_dict(self) -> dict[str, Any]:
        """Returns the record in plain types, as `torch.load(weights_only=True)` reads them."""
        return {"version": _VERSION, "runs": [list(run) for run in self._runs]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the record by a saved one.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If `state` is not what `state_dict` returns; the record is unchanged.
        """
        self._runs = _checked_runs(state)
        self._steps = sum(run.steps for run in self._runs)
        self._answers.clear()


_VERSION = 1


def _checked_run(where: str, noise_multiplier: Any, sampling_prob: Any, steps: Any) -> _Run:
    hint = "Pass what the noise was drawn with."
    noise_multiplier = _validate.non_negative(f"{where}noise_multiplier", noise_multiplier, hint)
    if sampling_prob is not None:
        hint = "Pass the probability of the loader, or None where there is none."
        sampling_prob = _validate.probability(f"{where}sampling_prob", sampling_prob, hint)
    hint = "Load an unchanged state_dict."
    return _Run(
        noise_multiplier,
        sampling_prob,
        _validate.integer(f"{where}steps", steps, hint, minimum=1),
    )


def _checked_runs(state: Any) -> list[_Run]:
    if not isinstance(state, Mapping) or set(state) != {"version", "runs"}:
        got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"`state` must have the keys 'runs' and 'version', got {got}. "
            f"Load what Ledger.state_dict returned."
        )
    if state["version"] != _VERSION:
        raise ValueError(
            f"`state['version']` must be {_VERSION}, got {state['version']!r}. "
            f"Load it with the version of dpbridge that saved it."
        )
    if not isinstance(state["runs"], list | tuple):
        raise ValueError(
            f"`state['runs']` must be a list, got {state['runs']!r}. Load an unchanged state_dict."
        )
    runs = []
    for index, run in enumerate(state["runs"]):
        where = f"state['runs'][{index}]"
        if not isinstance(run, list | tuple) or len(run) != 3:
            raise ValueError(
                f"`{where}` must be noise multiplier, sampling probability and number of steps, "
                f"got {run!r}. Load an unchanged state_dict."
            )
        try:
            runs.append(_checked_run(f"{where}.", *run))
        except TypeError as error:
            raise ValueError(str(error)) from error
    return runs
