"""Parameters that change during training, split into phases in which they do not.

Example:
    >>> phases(10, noise_multipliers=((0, 2.0), (6, 4.0)), batch_sizes=((0, 32),))
    [Phase(updates=6, noise_multiplier=2.0, batch_size=32), Phase(updates=4, noise_multiplier=4.0, batch_size=32)]
"""  # noqa: E501

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from dpkernels import _validate

Value = TypeVar("Value", int, float)
Schedule = tuple[tuple[int, Value], ...]

_HINT = "Pass one value, or pairs of an update from which on a value holds and that value."


class Phase(NamedTuple):
    """Updates in a row with the same parameters."""

    updates: int
    noise_multiplier: float
    batch_size: int


def phases(
    num_updates: int, *, noise_multipliers: Schedule[float], batch_sizes: Schedule[int]
) -> list[Phase]:
    """Returns the phases of the first `num_updates` updates.

    Args:
        num_updates: How many updates there are.
        noise_multipliers: Pairs of the first update and the noise multiplier.
        batch_sizes: Pairs of the first update and the batch size.
    """
    starts = sorted({start for start, _ in (*noise_multipliers, *batch_sizes)})
    starts = [start for start in starts if start < num_updates]
    return [
        Phase(end - start, _value_at(noise_multipliers, start), _value_at(batch_sizes, start))
        for start, end in zip(starts, [*starts[1:], num_updates], strict=True)
    ]


def checked(name: str, value: Any, check: Callable[[str, Any], Value]) -> Schedule[Value]:
    """Returns a value, or pairs of updates and values, as pairs.

    Args:
        name: Of the parameter, for messages.
        value: One value, or pairs whose updates begin with 0 and increase.
        check: Returns a single value if it is in its range.

    Raises:
        ValueError: If the updates do not begin with 0 and increase.
        TypeError: If it is neither a value nor pairs.
    """
    if not isinstance(value, Sequence):
        return ((0, check(name, value)),)
    pairs = []
    for pair in value:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"`{name}` must consist of pairs, got {pair!r}. {_HINT}")
        start = _validate.integer(name, pair[0], _HINT, minimum=0)
        pairs.append((start, check(name, pair[1])))
    starts = [start for start, _ in pairs]
    if not starts or starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
        raise ValueError(
            f"`{name}` must hold from update 0 on and change at increasing ones, got {starts}. "
            f"{_HINT}"
        )
    return tuple(pairs)


def scaled(sizes: Schedule[int], scales: Mapping[int, int]) -> Schedule[int]:
    """Returns batch sizes that grow by a factor from each of some updates on.

    Factors multiply, as in optax.piecewise_constant_schedule.
    """
    starts = sorted({0, *scales, *(start for start, _ in sizes)})
    return tuple(
        (start, _value_at(sizes, start) * math.prod(scales[at] for at in scales if at <= start))
        for start in starts
    )


def _value_at(schedule: Schedule[Value], update: int) -> Value:
    return next(value for start, value in reversed(schedule) if start <= update)
