"""An answer, as an aligned table and as JSON."""

import json
import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from typing import Any

Row = tuple[str, str]

_DIGITS = 6


@dataclass(frozen=True)
class Report:
    """What a command answers.

    Attributes:
        values: For programs: numbers as they are.
        rows: For people: pairs of a name and a text.
        exit_code: Of the process.
    """

    values: dict[str, Any]
    rows: list[Row]
    exit_code: int = 0

    def as_table(self) -> str:
        """Returns the rows, aligned."""
        width = max(len(name) for name, _ in self.rows)
        return "".join(f"{name:<{width}}   {text}\n" for name, text in self.rows)

    def as_json(self) -> str:
        """Returns one JSON object, in which what JSON has no number for is a string ("inf")."""
        return json.dumps(_valid(self.values), indent=2, allow_nan=False) + "\n"


def rounded_up(number: float) -> str:
    """Returns six digits of a number that are never below it, as a claim must be printed.

    >>> rounded_up(3.7700001), rounded_up(3.0), rounded_up(math.inf)
    ('3.77001', '3', 'inf')
    """
    return _rounded(number, ROUND_CEILING)


def rounded_down(number: float) -> str:
    """Returns six digits of a number that are never above it, as a lower bound must be printed.

    >>> rounded_down(0.12345678)
    '0.123456'
    """
    return _rounded(number, ROUND_FLOOR)


def _rounded(number: float, direction: str) -> str:
    if not math.isfinite(number):
        return str(number)
    # The shortest decimal that reads back as the number: 1.1 is 1.1, not a little more.
    digits = Context(prec=_DIGITS, rounding=direction).create_decimal(repr(float(number)))
    return f"{float(digits):.{_DIGITS}g}"


def _valid(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _valid(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
