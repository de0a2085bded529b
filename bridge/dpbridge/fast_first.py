"""Two programs of one sum: a fast one, and one that can be relied on whatever a batch holds.

What forms norms anew where rounding or overflow spoiled them never runs in most trainings, and is
half of what there is to trace and to compile.
"""

from collections.abc import Callable
from typing import Any

Program = Callable[..., Any]


class FastFirst:
    """Runs the fast program until a batch needs care, and from that batch on the careful one.

    Args:
        careful: Returns a result.
        fast: Returns `(result, needs_care)`, see `dpkernels.BoundedSensitivityCallable.fast_fun`;
            None where there is nothing that it could leave out.
        check: Raises if a result's batch is to be refused. Called with every result.

    Attributes:
        ready_sizes: Padded sizes at which the program in use has run and, unless that is off, was
            checked: none once the other one is.

    Guarantees:
        Nothing is returned of a result that needs care: the same call runs again, carefully.
        It does not come back to the fast program, which has no advantage once both are compiled.
    """

    def __init__(
        self, careful: Program, fast: Program | None, check: Callable[[Any], None] | None = None
    ) -> None:
        self._careful, self._fast, self._check = careful, fast, check
        self.ready_sizes: set[int] = set()

    @property
    def is_careful(self) -> bool:
        """Whether the careful program is the one in use."""
        return self._fast is None

    @property
    def in_use(self) -> Program:
        """The program in use."""
        return self._careful if self._fast is None else self._fast

    def __call__(self, *args: Any) -> Any:
        """Returns the result for a batch.

        Args:
            *args: Of the program.

        Raises:
            IndexError: As `check` does.
        """
        if self._fast is not None:
            result, needs_care = self._fast(*args)
            self._refuse(result)
            if not bool(needs_care):
                return result
            del result, needs_care
            self.ready_sizes.clear()  # First: an interrupt may fall in between.
            self._fast = None
        result = self._careful(*args)
        self._refuse(result)
        return result

    def _refuse(self, result: Any) -> None:
        if self._check is not None:
            self._check(result)
