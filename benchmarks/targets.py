"""The figures of one row, and what they are to reach."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from benchmarks.measure import Spread, spread

Record = Mapping[str, Any]

OPACUS = ("hooks", "functorch", "ew", "ghost")
PEERS = (*OPACUS, "jax-privacy", "jax-privacy-best")


class Overhead(NamedTuple):
    """What `DPOptimizer` adds to its parts, in seconds.

    Attributes:
        step: A whole step.
        parts: Program, noise and base optimizer, each alone.
        difference: The step less its parts, round by round.
        hollow: A step whose program is replaced by its stored result, less noise and base
            optimizer: the same, without the uncertainty of the program's time.
    """

    step: Spread
    parts: Spread
    difference: Spread
    hollow: Spread


class Verdict(NamedTuple):
    """One target on one row, or over all of them.

    Attributes:
        target: What is measured.
        row: The row's title, or "geometric mean".
        figure: What was measured, None where there is nothing to compare.
        bound: What it must not exceed.
        is_reached: Whether it does not.
        unit: Of figure and bound.
    """

    target: str
    row: str
    figure: float | None
    bound: float
    is_reached: bool | None
    unit: str


def seconds(row: Record, name: str) -> float | None:
    """Returns the median time of a contender, None if it has none on this row."""
    found = _of(row, name, "seconds")
    return spread(found).median if found else None


def ratio(row: Record, name: str, to: str) -> float | None:
    """Returns by how much one contender's time exceeds another's."""
    return _over(seconds(row, name), seconds(row, to))


def best(row: Record, names: Iterable[str]) -> float | None:
    """Returns the time of the fastest."""
    found = [time for name in names if (time := seconds(row, name)) is not None]
    return min(found, default=None)


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Returns the geometric mean of those that there are."""
    found = [value for value in values if value is not None]
    return math.exp(sum(map(math.log, found)) / len(found)) if found else None


def overhead(row: Record) -> Overhead | None:
    """Returns what the bridge adds to the parts of a step."""
    found = row["bridge"].get("seconds")
    if not found:
        return None
    parts = ("step", "kernel", "noise", "base", "stub")
    rounds = list(zip(*(found[part] for part in parts), strict=True))
    return Overhead(
        step=spread([step for step, *_ in rounds]),
        parts=spread([k + n + b for _, k, n, b, _ in rounds]),
        difference=spread([step - k - n - b for step, k, n, b, _ in rounds]),
        hollow=spread([stub - n - b for _, _, n, b, stub in rounds]),
    )


def limits(rows: Mapping[str, Record]) -> dict[str, float | None]:
    """Returns what no work on the kernel alone can change, geometric means, by what they are."""
    every = rows.values()
    return {
        "time of JAX without privacy, over torch": geometric_mean(
            ratio(row, "jax", "torch") for row in every
        ),
        "operations of dpbridge, over JAX without privacy": geometric_mean(
            _over(_of(row, "ours", "flops"), _of(row, "jax", "flops")) for row in every
        ),
        "time over the best of Opacus, were it torch's without privacy": geometric_mean(
            _over(seconds(row, "torch"), best(row, OPACUS)) for row in every
        ),
    }


def verdicts(rows: Mapping[str, Record]) -> list[Verdict]:
    """Holds the figures against the targets."""
    return [
        *_both("time over torch eager", rows, lambda row: ratio(row, "ours", "torch"), 1.0, 1.3),
        *_both("time over JAX", rows, lambda row: ratio(row, "ours", "jax"), 1.25, 1.5),
        *_each("temporaries over JAX", rows, _temporaries, 1.25),
        *_each("time over the best peer", rows, lambda row: _over_best(row, PEERS), 1.0),
        _mean("time over the best of Opacus", rows, lambda row: _over_best(row, OPACUS), 1 / 3),
        *(_bridge(row) for row in rows.values()),
        *_each("first call", rows, _first_call, 15.0, "s"),
    ]


def _both(
    target: str,
    rows: Mapping[str, Record],
    figure: Callable[[Record], float | None],
    mean: float,
    each: float,
) -> list[Verdict]:
    return [_mean(target, rows, figure, mean), *_each(target, rows, figure, each)]


def _mean(
    target: str, rows: Mapping[str, Record], figure: Callable[[Record], float | None], bound: float
) -> Verdict:
    value = geometric_mean(map(figure, rows.values()))
    return _verdict(target, "geometric mean", value, bound, "×")


def _each(
    target: str,
    rows: Mapping[str, Record],
    figure: Callable[[Record], float | None],
    bound: float,
    unit: str = "×",
) -> list[Verdict]:
    return [_verdict(target, row["title"], figure(row), bound, unit) for row in rows.values()]


def _bridge(row: Record) -> Verdict:
    """The larger of 5 % of the step and 1 ms is allowed."""
    found = overhead(row)
    figure, bound = None, 1.0
    if found is not None:
        figure, bound = 1e3 * found.difference.median, max(1.0, 50 * found.step.median)
    return _verdict("bridge", row["title"], figure, bound, "ms")


def _verdict(target: str, row: str, figure: float | None, bound: float, unit: str) -> Verdict:
    return Verdict(target, row, figure, bound, None if figure is None else figure <= bound, unit)


def _temporaries(row: Record) -> float | None:
    return _over(_of(row, "ours", "temporary_bytes"), _of(row, "jax", "temporary_bytes"))


def _of(row: Record, name: str, what: str) -> Any:
    return row["contenders"].get(name, {}).get(what)


def _over_best(row: Record, names: Iterable[str]) -> float | None:
    return _over(seconds(row, "ours"), best(row, names))


def _first_call(row: Record) -> float | None:
    found = row["contenders"].get("ours", {})
    return found.get("first_call_seconds") if "refused" not in found else None


def _over(value: float | None, other: float | None) -> float | None:
    return value / other if value is not None and other else None
