"""Checks of user input; every message says what is required, what came, and what to do."""

import math
import numbers
from typing import Any


def _real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a real number, got {value!r}. Pass a float.")
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf if bool(value > 0) else -math.inf  # type: ignore[operator]


def positive(name: str, value: Any, hint: str) -> float:
    """Returns `value` as a float if it is finite and above zero."""
    number = _real(name, value)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"`{name}` must be positive and finite, got {value!r}. {hint}")
    return number


def non_negative(name: str, value: Any, hint: str) -> float:
    """Returns `value` as a float if it is finite and not below zero."""
    number = _real(name, value)
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"`{name}` must be non-negative and finite, got {value!r}. {hint}")
    return number


def probability(name: str, value: Any, hint: str) -> float:
    """Returns `value` as a float if it lies in (0, 1]."""
    number = _real(name, value)
    if not 0 < number <= 1:
        raise ValueError(f"`{name}` must be in (0, 1], got {value!r}. {hint}")
    return number


def open_unit(name: str, value: Any, hint: str) -> float:
    """Returns `value` as a float if it lies in (0, 1)."""
    number = _real(name, value)
    if not 0 < number < 1:
        raise ValueError(f"`{name}` must be in (0, 1), got {value!r}. {hint}")
    return number


def integer(name: str, value: Any, hint: str, *, minimum: int) -> int:
    """Returns `value` as an int if it is a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an integer, got {value!r}. {hint}")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value!r}. {hint}")
    return int(value)


def one_of(name: str, value: Any, allowed: Any) -> Any:
    """Returns `value` if it is among `allowed`; the message lists what is."""
    options = list(allowed)
    if value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ValueError(f"`{name}` must be one of {listed}, got {value!r}. Choose one of them.")
    return value
