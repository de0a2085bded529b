"""A hard limit on what a run may spend."""

from typing import Protocol

from dpkernels import _validate


class PrivacyBudgetExceeded(RuntimeError):  # noqa: N818
    """The next step would spend more than the budget; it was not made."""


class _Ledger(Protocol):
    @property
    def steps(self) -> int: ...

    def epsilon_after(self, steps: int, delta: float, accountant: str | None) -> float: ...


class PrivacyBudget:
    """Refuses the step that would pass an epsilon.

    Args:
        epsilon: The most that all steps together may spend, positive and finite.
        delta: In (0, 1); well below 1 / number of examples.
        accountant: `"pld"`, `"rdp"`, or None for the tightest.

    Raises:
        ValueError: If an argument is out of range.

    Guarantees:
        `check` raises unless the ledger, with one step more, spends at most `epsilon`.
    """

    def __init__(self, epsilon: float, delta: float, accountant: str | None = None) -> None:
        self.epsilon = _validate.positive("epsilon", epsilon, "0.1 to 10 is usual.")
        hint = "Choose it well below one over the number of examples."
        self.delta = _validate.open_unit("delta", delta, hint)
        self.accountant = accountant
        self._within = 0  # so many steps in all are known to be affordable
        self._beyond: int | None = None  # and so many not to be
        self._basis: object = None

    def check(self, ledger: _Ledger, *, most: int | None = None, basis: object = None) -> None:
        """Raises if one more step would pass the budget.

        To state an epsilon takes some hundredths of a second, so it is asked for more steps than
        this one, and for fewer where they are too many: what many steps spend, fewer do not pass.

        Args:
            ledger: What was spent so far.
            most: How many steps there can be in all, or None.
            basis: What was spent on other than such steps; the answers of before hold for one.

        Raises:
            PrivacyBudgetExceeded: If it would.
            ValueError: If the ledger states no epsilon.
        """
        if basis != self._basis:
            self._within, self._beyond, self._basis = 0, None, basis
        wanted = ledger.steps + 1
        if wanted <= self._within:
            return
        ahead = wanted if most is None else most - wanted
        if self._beyond is not None:
            ahead = min(ahead, (self._beyond - wanted) // 2)
        while True:
            steps = wanted + max(ahead, 0)
            spent = ledger.epsilon_after(steps, self.delta, self.accountant)
            if spent <= self.epsilon:
                self._within = steps
                return
            self._beyond = min(steps, self._beyond or steps)
            if ahead <= 0:
                break
            ahead //= 2
        raise PrivacyBudgetExceeded(
            f"A step must stay within epsilon={self.epsilon:g} at delta={self.delta:g}, got one "
            f"that would spend {spent:.6g} in all. Nothing was released; {ledger.steps} steps were "
            "made before it. Stop here, or plan for more noise or fewer steps."
        )


def needed_delta(delta: float | None) -> float:
    """Returns delta; raises TypeError if it was left out beside an epsilon."""
    if delta is None:
        raise TypeError(
            "`delta` must be given with `epsilon`, got None. Pass one well below 1 / len(dataset)."
        )
    return delta
