"""Training accountants, with the names of JAX Privacy 1.0.

Example:
    >>> from dpbridge.accounting import accountants
    >>> accountant = DpsgdTrainingAccountant(accountants.RdpAccountantConfig())
    >>> params = DpParams(
    ...     noise_multipliers=4.0, num_samples=50_000, delta=1e-5, batch_size=1024)
    >>> round(accountant.compute_epsilon(10_000, params), 4)
    2.2753

It differs from JAX Privacy in what would not have been a bound: `SamplingMethod.FIXED_BATCH_SIZE`
is accounted as what it is, and an approximate cache rounds up.
"""

import abc
import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import dp_accounting
from dp_accounting import NeighboringRelation
from dp_accounting import dp_event as events
from scipy import stats

from dpbridge.accounting import schedules
from dpbridge.accounting.accountants import DpAccountantConfig
from dpkernels import _validate, composition

_NOISE_HINT = "0 means no noise and no privacy; 0.5 to 10 is usual."
_BATCH_HINT = "Pass the expected number of examples in a batch."
_SAMPLES_HINT = "Pass the number of examples in the dataset."
_UPDATES_HINT = "Pass the number of optimizer updates."


class SamplingMethod(enum.Enum):
    """How the examples of a batch are drawn, afresh for each batch."""

    POISSON = enum.auto()
    FIXED_BATCH_SIZE = enum.auto()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpParams:
    """What a training run does, as far as privacy is concerned.

    Args:
        noise_multipliers: Standard deviation of the noise over the clip norm; or pairs of an
            update, counted from 0, and the value from there on; or None where it is to be found.
        num_samples: How many examples there are.
        delta: The delta of (epsilon, delta)-differential privacy, in (0, 1).
        batch_size: Expected batch size, or pairs of an update and the size from there on.
        batch_size_scale_schedule: Factors by which the batch size grows at some updates.
        is_finite_guarantee: False states that nothing is guaranteed: epsilon is infinite.
        examples_per_user: How many examples one user has at most, where users are protected.
        cycle_length: Into how many parts the dataset is divided, of which batches are drawn in
            turn; the noise multiplier is then over the sensitivity of all of them together.
        sampling_method: How batches are drawn.
        truncated_batch_size: The largest batch: from larger draws, as many are chosen at random.

    Raises:
        ValueError: If a value is outside its range.
        TypeError: If a value has another type.
    """

    noise_multipliers: float | Sequence[tuple[int, float]] | None
    num_samples: int
    delta: float
    batch_size: int | Sequence[tuple[int, int]]
    batch_size_scale_schedule: Mapping[int, int] | None = None
    is_finite_guarantee: bool = True
    examples_per_user: int | None = None
    cycle_length: int | None = None
    sampling_method: SamplingMethod = SamplingMethod.POISSON
    truncated_batch_size: int | None = None

    def __post_init__(self) -> None:
        _validate.integer("num_samples", self.num_samples, _SAMPLES_HINT, minimum=1)
        _validate.open_unit("delta", self.delta, "Choose it well below one over num_samples.")
        if self.noise_multipliers is not None:
            self._noise_multipliers()
        self._batch_sizes()
        for name in ("examples_per_user", "cycle_length", "truncated_batch_size"):
            if getattr(self, name) is not None:
                _validate.integer(name, getattr(self, name), "Or leave it out.", minimum=1)
        if not isinstance(self.sampling_method, SamplingMethod):
            raise TypeError(
                f"`sampling_method` must be a SamplingMethod, got {self.sampling_method!r}. "
                f"Choose one of {', '.join(map(str, SamplingMethod))}."
            )

    def phases(self, num_updates: int) -> list[schedules.Phase]:
        """Returns noise multipliers and batch sizes of the first updates."""
        return schedules.phases(
            num_updates,
            noise_multipliers=self._noise_multipliers(),
            batch_sizes=self._batch_sizes(),
        )

    def _noise_multipliers(self) -> schedules.Schedule[float]:
        return schedules.checked("noise_multipliers", self.noise_multipliers, _checked_noise)

    def _batch_sizes(self) -> schedules.Schedule[int]:
        sizes = schedules.checked("batch_size", self.batch_size, _checked_size)
        scales = self.batch_size_scale_schedule or {}
        for at, scale in scales.items():
            hint = "Map updates to whole factors of the batch size."
            _validate.integer("batch_size_scale_schedule", at, hint, minimum=0)
            _validate.integer("batch_size_scale_schedule", scale, hint, minimum=1)
        return schedules.scaled(sizes, scales)


def _checked_noise(name: str, value: Any) -> float:
    return _validate.non_negative(name, value, _NOISE_HINT)


def _checked_size(name: str, value: Any) -> int:
    return _validate.integer(name, value, _BATCH_HINT, minimum=1)


class TrainingAccountant(Protocol):
    """What the functions of `calibrate` need."""

    def compute_epsilon(
        self, num_updates: int, dp_params: DpParams, allow_approximate_cache: bool = False
    ) -> float:
        """Returns the epsilon of the first `num_updates` updates."""

    def can_calibrate_steps(self) -> bool:
        """Returns whether fewer updates spend less."""

    def can_calibrate_batch_size(self) -> bool:
        """Returns whether smaller batches spend less."""

    def can_calibrate_noise_multipliers(self) -> bool:
        """Returns whether more noise spends less."""


class DpTrainingAccountant(abc.ABC):
    """Says what a training run spends.

    Args:
        dp_accountant_config: Which accountant to ask.
    """

    def __init__(self, dp_accountant_config: DpAccountantConfig) -> None:
        self._accountant = dp_accountant_config.composition_accountant

    def can_calibrate_steps(self) -> bool:
        """Returns whether fewer updates spend less."""
        return True

    def can_calibrate_batch_size(self) -> bool:
        """Returns whether smaller batches spend less."""
        return True

    def can_calibrate_noise_multipliers(self) -> bool:
        """Returns whether more noise spends less."""
        return True

    def compute_epsilon(
        self, num_updates: int, dp_params: DpParams, allow_approximate_cache: bool = False
    ) -> float:
        """Returns the epsilon that the first `num_updates` updates spend.

        Args:
            num_updates: How many updates there are, 0 or more.
            dp_params: What they do.
            allow_approximate_cache: Has no effect here; see `CachedExperimentAccountant`.

        Returns:
            The epsilon; 0.0 for no updates and infinity without a finite guarantee.

        Raises:
            ValueError: If `dp_params` does not suit this accountant.
            TypeError: If `num_updates` is no integer.

        Guarantees:
            * The result is never below the true epsilon.
        """
        del allow_approximate_cache
        if _validate.integer("num_updates", num_updates, _UPDATES_HINT, minimum=0) == 0:
            return 0.0
        if not dp_params.is_finite_guarantee:
            return math.inf
        _require(
            dp_params.noise_multipliers is not None, "noise_multipliers", "given", None, _NOISE_HINT
        )
        event, relation = self._event(num_updates, dp_params)
        return composition.epsilon_of_event(
            event, dp_params.delta, accountant=self._accountant, neighboring_relation=relation
        )

    @abc.abstractmethod
    def _event(
        self, num_updates: int, params: DpParams
    ) -> tuple[dp_accounting.DpEvent, NeighboringRelation]:
        """Returns what is released, and between which datasets it must not tell."""


class DpsgdTrainingAccountant(DpTrainingAccountant):
    """DP-SGD, one example being protected.

    Poisson samples are for the add-or-remove-one relation. With `cycle_length` or
    `truncated_batch_size` the size of the dataset is public, and the relation is that of replacing
    an example by one of no effect (REPLACE_SPECIAL). Batches of a fixed size are drawn without
    replacement, and the relation is REPLACE_ONE, under which sums differ by twice the clip norm.
    JAX Privacy accounts for them as Poisson samples with half the noise; for adaptive compositions
    that is not a bound, and a test shows datasets that spend more.
    """

    def _event(
        self, num_updates: int, params: DpParams
    ) -> tuple[dp_accounting.DpEvent, NeighboringRelation]:
        hint = "Use DpsgdTrainingUserLevelAccountant."
        _require(params.examples_per_user in (None, 1), *_got(params, "examples_per_user"), hint)
        phases, parts = params.phases(num_updates), params.cycle_length or 1
        hint = "With cycle_length, keep noise_multipliers and batch_size constant."
        _require(parts == 1 or len(params.phases(2**62)) == 1, *_got(params, "cycle_length"), hint)
        _check_truncation(params, self._accountant)
        size = params.num_samples // parts
        for phase in phases:
            _require(
                phase.batch_size <= size,
                "batch_size",
                f"at most num_samples // cycle_length = {size}",
                phase.batch_size,
                "Draw smaller batches.",
            )
        return events.ComposedDpEvent(
            [
                events.SelfComposedDpEvent(
                    self._release(phase, size, params), math.ceil(phase.updates / parts)
                )
                for phase in phases
            ]
        ), _relation(params)

    def _release(
        self, phase: schedules.Phase, size: int, params: DpParams
    ) -> dp_accounting.DpEvent:
        if params.sampling_method is SamplingMethod.FIXED_BATCH_SIZE:
            # Under REPLACE_ONE dp_accounting's Rényi accountant takes the noise over twice the
            # clip norm; the other one doubles by itself.
            doubled = 2 if self._accountant.name == "rdp" else 1
            gaussian = events.GaussianDpEvent(phase.noise_multiplier / doubled)
            return events.SampledWithoutReplacementDpEvent(size, phase.batch_size, gaussian)
        sampling_prob = phase.batch_size / size
        if params.truncated_batch_size is not None:
            return events.TruncatedSubsampledGaussianDpEvent(
                size, sampling_prob, params.truncated_batch_size, phase.noise_multiplier
            )
        gaussian = events.GaussianDpEvent(phase.noise_multiplier)
        return events.PoissonSampledDpEvent(sampling_prob, gaussian)


def _relation(params: DpParams) -> NeighboringRelation:
    if params.sampling_method is SamplingMethod.FIXED_BATCH_SIZE:
        return NeighboringRelation.REPLACE_ONE
    if params.truncated_batch_size is None and params.cycle_length in (None, 1):
        return NeighboringRelation.ADD_OR_REMOVE_ONE
    return NeighboringRelation.REPLACE_SPECIAL


class DpsgdTrainingUserLevelAccountant(DpTrainingAccountant):
    """DP-SGD on Poisson samples of examples, a user with several of them being protected.

    The relation is adding or removing a user. How many of a user's examples are in a batch is
    binomial, which makes each release a mixture of Gaussians (Ganesh 2024, arXiv 2401.10294).
    """

    def _event(
        self, num_updates: int, params: DpParams
    ) -> tuple[dp_accounting.DpEvent, NeighboringRelation]:
        examples = params.examples_per_user
        if examples is None:
            raise ValueError(
                "`examples_per_user` must be given, got None. Pass how many examples a user has "
                "at most, or use DpsgdTrainingAccountant."
            )
        hint = "Only Poisson samples of the whole dataset can be accounted for users."
        is_poisson = params.sampling_method is SamplingMethod.POISSON
        _require(is_poisson, *_got(params, "sampling_method"), hint)
        _require(params.cycle_length in (None, 1), *_got(params, "cycle_length"), hint)
        is_whole = params.truncated_batch_size is None
        _require(is_whole, *_got(params, "truncated_batch_size"), hint)
        composed = [
            events.SelfComposedDpEvent(_user_release(phase, params, examples), phase.updates)
            for phase in params.phases(num_updates)
        ]
        return events.ComposedDpEvent(composed), NeighboringRelation.ADD_OR_REMOVE_ONE


def _user_release(phase: schedules.Phase, params: DpParams, examples: int) -> dp_accounting.DpEvent:
    bound = f"at most num_samples = {params.num_samples}"
    is_within = phase.batch_size <= params.num_samples
    _require(is_within, "batch_size", bound, phase.batch_size, "Draw smaller batches.")
    counts = range(examples + 1)
    shares = stats.binom.pmf(counts, examples, phase.batch_size / params.num_samples)
    return events.MixtureOfGaussiansDpEvent(
        phase.noise_multiplier, tuple(map(float, counts)), tuple(map(float, shares))
    )


class SingleReleaseTrainingAccountant(DpTrainingAccountant):
    """One Gaussian mechanism for the whole run, however many updates are made of its output.

    It is what DP-FTRL with a factorised matrix spends when no amplification by sampling is
    counted. The relation is that which the sensitivity was computed for.
    """

    def can_calibrate_steps(self) -> bool:
        """Returns False: the number of updates has no effect."""
        return False

    def can_calibrate_batch_size(self) -> bool:
        """Returns False: the batch size has no effect."""
        return False

    def _event(
        self, num_updates: int, params: DpParams
    ) -> tuple[dp_accounting.DpEvent, NeighboringRelation]:
        del num_updates
        hint = "Count all examples of a user in the sensitivity, and leave it out here."
        _require(params.examples_per_user in (None, 1), *_got(params, "examples_per_user"), hint)
        noise_multipliers = {phase.noise_multiplier for phase in params.phases(2**62)}
        hint = "One release has one noise multiplier."
        _require(len(noise_multipliers) == 1, *_got(params, "noise_multipliers"), hint)
        event = events.GaussianDpEvent(noise_multipliers.pop())
        return event, NeighboringRelation.ADD_OR_REMOVE_ONE


class CachedExperimentAccountant:
    """Remembers epsilons, for showing them while training.

    Args:
        training_accountant: What computes them.
        max_num_updates: Up to how many updates approximations are given.
        num_cached_points: At how many numbers of updates they are computed.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(
        self,
        training_accountant: TrainingAccountant,
        max_num_updates: int,
        num_cached_points: int = 100,
    ) -> None:
        hint = "100 points are usual."
        _validate.integer("max_num_updates", max_num_updates, _UPDATES_HINT, minimum=1)
        _validate.integer("num_cached_points", num_cached_points, hint, minimum=1)
        self._training_accountant = training_accountant
        self._max_num_updates = max_num_updates
        self._num_points = num_cached_points
        self._epsilons: dict[tuple[str, int], float] = {}

    def compute_epsilon(
        self, num_updates: int, dp_params: DpParams, allow_approximate_cache: bool = False
    ) -> float:
        """Returns the epsilon that the first `num_updates` updates spend.

        Args:
            num_updates: How many updates there are, 0 or more.
            dp_params: What they do.
            allow_approximate_cache: Whether to give the epsilon of the next of the cached numbers
                of updates, which is computed once.

        Raises:
            ValueError: If `dp_params` does not suit the accountant, or an approximation is asked
                for beyond `max_num_updates`.

        Guarantees:
            * The result is never below the true epsilon, also where it is approximate.
        """
        if not allow_approximate_cache:
            return self._training_accountant.compute_epsilon(num_updates, dp_params)
        _validate.integer("num_updates", num_updates, _UPDATES_HINT, minimum=0)
        _require(
            num_updates <= self._max_num_updates,
            "num_updates",
            f"at most max_num_updates = {self._max_num_updates}",
            num_updates,
            "Leave allow_approximate_cache out.",
        )
        point = -(-num_updates * self._num_points // self._max_num_updates)
        rounded_up = -(-point * self._max_num_updates // self._num_points)
        key = (repr(dp_params), rounded_up)
        if key not in self._epsilons:
            self._epsilons[key] = self._training_accountant.compute_epsilon(rounded_up, dp_params)
        return self._epsilons[key]


def _check_truncation(params: DpParams, accountant: composition.Accountant) -> None:
    if params.truncated_batch_size is None:
        return
    is_poisson = params.sampling_method is SamplingMethod.POISSON
    hint = "Truncated are Poisson samples, accounted by privacy loss distributions."
    name, _, value = _got(params, "truncated_batch_size")
    required = "left out unless batches are Poisson samples and the accountant is 'pld'"
    _require(is_poisson and accountant.name == "pld", name, required, value, hint)


def _got(params: DpParams, name: str) -> tuple[str, str, Any]:
    return name, "what this accountant supports", getattr(params, name)


def _require(is_met: bool, name: str, requirement: str, value: Any, hint: str) -> None:
    if not is_met:
        raise ValueError(f"`{name}` must be {requirement}, got {value!r}. {hint}")
