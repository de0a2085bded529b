"""What every config of a plan has in common: its accountants, its epsilon, its calibration."""

import abc
import copy
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias, runtime_checkable

import dp_accounting

from dpkernels import _validate
from dpkernels.composition import epsilon_of_event, smallest_noise_multiplier
from dpkernels.execution_plan.performance import PerformanceFlags, PlannedClipping

if TYPE_CHECKING:
    from dpkernels.execution_plan.plan import DPExecutionPlan

NeighboringRelation: TypeAlias = dp_accounting.NeighboringRelation
_NORM_HINT = "Pass the largest L2 norm that one example's gradient may have."


@runtime_checkable
class ExecutionPlanConfig(Protocol):
    """Numbers from which a plan is made."""

    def make(self, performance_flags: PerformanceFlags | None = None) -> "DPExecutionPlan":
        """Returns the plan."""
        ...


class _Copied:
    """A field of which every reader gets a copy: a frozen config's containers are frozen too."""

    def __init__(self, default: Any) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name  # In `vars` under its own name: a data descriptor goes first.

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        if config is None:
            return self._default  # Which `dataclass` asks the class for.
        return copy.deepcopy(vars(config)[self._name])

    def __set__(self, config: Any, value: Any) -> None:
        vars(config)[self._name] = value


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivateConfig(abc.ABC):
    """A config whose plan has an epsilon.

    Attributes:
        iterations: How many noised sums are released, at least 1.
        noise_multiplier: Standard deviation of the noise over the sensitivity, which
            `neighboring_relation` decides: the clip norm, or twice that for REPLACE_ONE. None
            until `calibrate` fills it in; 0 is not private.
        l2_clip_norm: Bound on the L2 norm of each example's gradient: a number, or a prefix tree
            of the gradient to clip layers each by itself, of what JSON holds: dicts with names
            for keys, and lists. Reading it gives a copy.
        rescale_to_unit_norm: Divides clipped gradients by the clip norm.
        normalize_by: The sum is divided by this public number, noise and all. Never the drawn
            batch size.
    """

    iterations: int
    noise_multiplier: float | None = None
    l2_clip_norm: Any = _Copied(1.0)
    rescale_to_unit_norm: bool = False
    normalize_by: float = 1.0

    def __post_init__(self) -> None:
        hint = "Pass the number of steps."
        self._set("iterations", _validate.integer("iterations", self.iterations, hint, minimum=1))
        if self.noise_multiplier is not None:
            hint = "Find it with calibrate(epsilon=..., delta=...)."
            noise = _validate.non_negative("noise_multiplier", self.noise_multiplier, hint)
            self._set("noise_multiplier", noise)
        self._set("l2_clip_norm", _checked_norms(self.l2_clip_norm))
        hint = "Pass the expected batch size, or 1."
        self._set("normalize_by", _validate.positive("normalize_by", self.normalize_by, hint))
        if not isinstance(self.rescale_to_unit_norm, bool):
            raise TypeError(
                "`rescale_to_unit_norm` must be True or False, got "
                f"{self.rescale_to_unit_norm!r}. Pass one of them."
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # The only way in a frozen dataclass.

    @property
    @abc.abstractmethod
    def accountants(self) -> tuple[str, ...]:
        """The accountants that can answer, the tightest first."""

    @property
    @abc.abstractmethod
    def relation(self) -> NeighboringRelation:
        """What makes two datasets neighbours."""

    @abc.abstractmethod
    def _dp_event(self, noise_multiplier: float, steps: int) -> dp_accounting.DpEvent:
        """Returns the event of the first steps; noise over `l2_clip_norm`-like sensitivity."""

    @abc.abstractmethod
    def make(self, performance_flags: PerformanceFlags | None = None) -> "DPExecutionPlan":
        """Returns the plan.

        Args:
            performance_flags: How it is computed.

        Raises:
            ValueError: If there is no noise multiplier yet.
        """

    def dp_event(
        self, *, steps: int | None = None, accountant: str | None = None
    ) -> dp_accounting.DpEvent:
        """Returns what the first steps release, in the words of dp_accounting.

        Args:
            steps: How many; by default `iterations`.
            accountant: In whose convention: under REPLACE_ONE dp_accounting's PLD accountant
                takes noise over the clip norm, its RDP accountant noise over twice that.

        Raises:
            ValueError: If there is no noise multiplier yet, an argument is out of range, or the
                accountant cannot answer.
        """
        return self._event_of(self._noise(), steps, self.check_accountant(accountant))

    def _event_of(
        self, noise_multiplier: float, steps: int | None, accountant: str
    ) -> dp_accounting.DpEvent:
        steps = self.iterations if steps is None else steps
        hint = "Pass the steps made so far."
        steps = _validate.integer("steps", steps, hint, minimum=0)
        if steps > self.iterations:
            raise ValueError(
                f"`steps` must be at most `iterations`, {self.iterations}, got {steps}. "
                "Make a config of more iterations."
            )
        if self.relation is NeighboringRelation.REPLACE_ONE and accountant == "pld":
            noise_multiplier = 2 * noise_multiplier
        return self._dp_event(noise_multiplier, steps)

    def check_accountant(self, accountant: str | None) -> str:
        """Returns the accountant, or the tightest for None.

        Raises:
            ValueError: If no accountant, or not this one, can answer for this sampling.
        """
        if not self.accountants:
            raise ValueError(
                f"`{type(self).__name__}` must draw batches in a way whose accounting is known, "
                "got one for which no accountant is sound. Draw by Poisson subsampling."
            )
        if accountant is None:
            return self.accountants[0]
        return str(_validate.one_of("accountant", accountant, self.accountants))

    def epsilon(
        self, delta: float, *, steps: int | None = None, accountant: str | None = None
    ) -> float:
        """Returns the epsilon that the first steps spend.

        Args:
            delta: In (0, 1); well below 1 / number of examples.
            steps: How many; by default `iterations`.
            accountant: `"pld"` or `"rdp"`; by default the tightest that can answer.

        Raises:
            ValueError: As `dp_event`, or if `delta` is out of range.
        """
        accountant = self.check_accountant(accountant)
        return epsilon_of_event(
            self.dp_event(steps=steps, accountant=accountant),
            delta,
            accountant=accountant,
            neighboring_relation=self.relation,
        )

    def calibrate(self, *, epsilon: float, delta: float, accountant: str | None = None) -> Self:
        """Returns this config with about the smallest noise that spends at most `epsilon`.

        Args:
            epsilon: The epsilon that all steps together may spend, positive and finite.
            delta: In (0, 1); well below 1 / number of examples.
            accountant: `"pld"` or `"rdp"`; by default the tightest that can answer.

        Raises:
            ValueError: If an argument is out of range, or no noise reaches the target.

        Guarantees:
            `epsilon(delta)` of the result, asked of the same accountant, is never above `epsilon`.
        """
        accountant = self.check_accountant(accountant)
        noise_multiplier = smallest_noise_multiplier(
            lambda noise: self._event_of(noise, None, accountant),
            epsilon=epsilon,
            delta=delta,
            accountant=accountant,
            neighboring_relation=self.relation,
        )
        return dataclasses.replace(self, noise_multiplier=noise_multiplier)

    def _clipped_grad(self, flags: PerformanceFlags) -> PlannedClipping:
        return PlannedClipping(
            flags,
            l2_clip_norm=self.l2_clip_norm,
            rescale_to_unit_norm=self.rescale_to_unit_norm,
            normalize_by=self.normalize_by,
        )

    def sensitivity(self) -> float:
        """Returns by how much the clipped sums of neighbours differ at most, in L2 norm."""
        clipped_grad = self._clipped_grad(PerformanceFlags())
        return clipped_grad(lambda *_: None).sensitivity(self.relation)

    def _noise(self) -> float:
        if self.noise_multiplier is None:
            raise ValueError(
                "`noise_multiplier` must be known, got None. Pass one, or let "
                "calibrate(epsilon=..., delta=...) find it."
            )
        return self.noise_multiplier


def _checked_norms(norms: Any) -> Any:
    """Returns clip norms in containers of their own, which JSON holds as they are."""
    if isinstance(norms, dict | list) and not norms:
        raise ValueError(f"`l2_clip_norm` must hold a number, got {norms!r}. {_NORM_HINT}")
    if type(norms) is dict and all(type(name) is str for name in norms):
        return {name: _checked_norms(below) for name, below in norms.items()}
    if type(norms) is list:
        return [_checked_norms(below) for below in norms]
    if isinstance(norms, Mapping | list | tuple):
        raise TypeError(
            "`l2_clip_norm` must be a number, or numbers in lists and in dicts with names for "
            f"keys, got {norms!r}. A saved config could not tell other containers apart."
        )
    return _validate.positive("l2_clip_norm", norms, _NORM_HINT)
