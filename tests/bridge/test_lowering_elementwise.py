"""Arithmetic, comparison and the functions of one number: values, gradients and ties."""

import pytest
import torch

from lowering_checks import BATCH, assert_same, compare, integers, normal, positive

POINTS = torch.tensor([-3.5, -2.0, -1.0, -0.5, 0.0, 0.0, 0.25, 0.5, 1.0, 2.5, 3.0])


def points():
    """Values with zeros, halves and integers among them, another order an example."""
    return torch.stack([POINTS.roll(i) for i in range(BATCH)]).double()


EVERYWHERE = [
    "abs",
    "atan",
    "ceil",
    "cos",
    "cosh",
    "deg2rad",
    "erf",
    "erfc",
    "exp",
    "exp2",
    "expm1",
    "floor",
    "frac",
    "neg",
    "positive",
    "rad2deg",
    "round",
    "sgn",
    "sigmoid",
    "sign",
    "sin",
    "sinh",
    "square",
    "tan",
    "tanh",
    "trunc",
    "isfinite",
    "isinf",
    "isnan",
    "logical_not",
]
ON_POSITIVE = [
    "acosh",
    "asinh",
    "digamma",
    "lgamma",
    "log",
    "log10",
    "log1p",
    "log2",
    "reciprocal",
    "rsqrt",
    "sqrt",
]
PAIRS = [
    "add",
    "sub",
    "mul",
    "div",
    "maximum",
    "minimum",
    "fmax",
    "fmin",
    "fmod",
    "remainder",
    "hypot",
    "logaddexp",
    "logaddexp2",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "logical_and",
    "logical_or",
    "logical_xor",
    "isclose",
]

CASES = {
    **{name: (getattr(torch, name), points()) for name in EVERYWHERE},
    **{name: (getattr(torch, name), positive(7) + (name == "acosh")) for name in ON_POSITIVE},
    **{f"{name} of two": (getattr(torch, name), points(), normal(11)) for name in PAIRS},
    "acos": (torch.acos, normal(5).clamp(-0.9, 0.9)),
    "asin": (torch.asin, normal(5).clamp(-0.9, 0.9)),
    "atanh": (torch.atanh, normal(5).clamp(-0.9, 0.9)),
    "erfinv": (torch.erfinv, normal(5).clamp(-0.9, 0.9)),
    "sqrt at zero": (torch.sqrt, torch.zeros(BATCH, 2, dtype=torch.float64)),
    "round decimals": (lambda x: x.round(decimals=1), normal(5)),
    "logit": (torch.logit, positive(5) / 1.2),
    "logit with eps": (lambda x: torch.logit(x, 0.2), positive(5) / 1.2),
    "nan_to_num": (
        torch.nan_to_num,
        torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]] * BATCH).double(),
    ),
    "nan_to_num with values": (
        lambda x: torch.nan_to_num(x, nan=1.0, posinf=2.0, neginf=3.0),
        torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]] * BATCH).double(),
    ),
    "add with alpha": (lambda x, y: torch.add(x, y, alpha=2.5), normal(4), normal(4)),
    "sub with alpha": (lambda x, y: torch.sub(x, y, alpha=3), normal(4), normal(4)),
    "rsub with alpha": (lambda x, y: torch.rsub(x, y, alpha=3), normal(4), normal(4)),
    "numbers": (lambda x: [x + 2, x - 2, x * 2, x / 2, 2 - x, 2 / x, x % 0.7], normal(4)),
    "broadcasting": (lambda x, y: [x + y, x * y, x < y], normal(4, 1), normal(3)),
    "div trunc": (lambda x, y: torch.div(x, y, rounding_mode="trunc"), normal(9), normal(9)),
    "div floor": (lambda x, y: torch.div(x, y, rounding_mode="floor"), normal(9), normal(9)),
    "floor_divide": (
        lambda x, y: [x.detach() // y.detach(), x.detach() // 0.3],
        normal(9),
        normal(9),
    ),
    "div without mode": (lambda x: torch.div(x, 3, rounding_mode=None), normal(9)),
    "atan2": (torch.atan2, normal(9), normal(9)),
    "xlogy": (torch.xlogy, points(), positive(1)),
    "maximum at ties": (torch.maximum, points(), points().sort().values),
    "minimum at ties": (torch.min, points(), points().sort().values),
    "max of two at ties": (torch.max, points(), points().roll(1, 1)),
    "fmax at ties": (torch.fmax, points(), points().sort().values),
    "fmin at ties": (torch.fmin, points(), points().sort().values),
    "pow of numbers": (
        lambda x: [x**2, x**3, x**0, x**1, x**-1, x**-2, x**20, x.pow(2.0)],
        normal(5),
    ),
    "pow at zero": (lambda x: [x**2, x**3, x**0, x**1], points()),
    "pow of fractions": (lambda x: [x**0.5, x**1.7, x**-0.5, x**-1.3], positive(7)),
    "pow of tensors": (torch.pow, positive(7), normal(7)),
    "pow of tensors at zero": (torch.pow, points().abs(), points().abs().flip(1)),
    "number to a power": (lambda x: [2**x, 0.5**x], points()),
    "float_power": (lambda x, y: [x.float_power(2), x.float_power(y)], positive(7), normal(7)),
    "lerp": (lambda x, y, w: [x.lerp(y, 0.3), x.lerp(y, w)], normal(4), normal(4), normal(4)),
    "addcmul": (lambda x, y, z: torch.addcmul(x, y, z, value=2), normal(4), normal(4), normal(4)),
    "addcdiv": (lambda x, y, z: torch.addcdiv(x, y, z, value=2), normal(4), normal(4), normal(4)),
    "clamp at bounds": (
        lambda x: [x.clamp(-1, 1), x.clamp(0.25), x.clamp(max=0), x.clamp(2, -2), x.clamp_min(0)],
        points(),
    ),
    "clamp by tensors": (
        lambda x, low, high: [x.clamp(low, high), x.clamp_max(high), x.clamp(min=low)],
        points(),
        torch.full((BATCH, 11), -1.0).double(),
        torch.full((BATCH, 1), 2.5).double(),
    ),
    "where": (
        lambda x, y: [
            torch.where(x > 0, x, y),
            torch.where(x > 0, x, 0.0),
            torch.where(x > 0, 1.0, y),
            torch.where(x > 0, 1.0, 2.0),
            torch.where(x > 0, x, torch.sqrt(x)),
        ],
        points().abs(),
        normal(11),
    ),
    "masked_fill": (
        lambda x, value: [x.masked_fill(x > 0, -1.0), x.masked_fill(x > 0, value)],
        points(),
        normal(),
    ),
    "integers": (
        lambda x, y: [x + y, x * y, x - 2 * y, x / y, x // y, x % y, x.fmod(y), x**2, -x, x.abs()],
        integers(9),
        integers(9, low=1, high=5),
    ),
    "integers to floats": (lambda x: [x.exp(), x.sqrt(), x.sigmoid(), x + 0.5], integers(9, low=0)),
    "div of integers": (
        lambda x, y: [torch.div(x, y, rounding_mode=m) for m in ("trunc", "floor")],
        integers(9),
        integers(9, low=1, high=5),
    ),
    "bits": (
        lambda x, y: [x & y, x | y, x ^ y, ~x, x & 3, (x > 0) & (y > 0), ~(x > 0), (x > 0) ^ True],
        integers(9),
        integers(9),
    ),
    "comparison with numbers": (
        lambda x: [x == 0, x != 0, x < 0.5, x <= 0.5, x > -1, x >= -1],
        points(),
    ),
    "comparison of types": (lambda x, y: [x < y, y == 0.5, x == y], points(), integers(11)),
    "casts": (
        lambda x: [x.int(), x.long(), x.bool(), x.to(torch.int8), x.type_as(x), x.to(x)],
        normal(4) * 3,
    ),
    "casts to floats": (lambda x: [x.double(), x.to(torch.float64)], integers(9)),
    "promotion": (
        lambda x, y, z: [x + y, y + z, x * z, z + 1.5, y * True, torch.where(z, y, x)],
        normal(4),
        integers(4),
        integers(4) > 0,
    ),
}


@pytest.fixture(scope="module")
def results():
    return compare(CASES)


@pytest.mark.parametrize("name", CASES)
def test_elementwise_equals_torch(results, name):
    assert_same(results[name])
