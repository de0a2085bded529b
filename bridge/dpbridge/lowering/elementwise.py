"""Arithmetic, comparison and the functions of one number."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax
from jax.scipy import special

from dpbridge.lowering.dtypes import Operand, Scalar, promote, widen
from dpbridge.lowering.table import Call, register_lowering, shares_memory

aten = torch.ops.aten


def absolute(x: jax.Array) -> jax.Array:
    """Returns the absolute value, whose gradient at 0 is 0 in torch and 1 in JAX."""
    return x * jnp.sign(x)


def operands(call: Call, *values: Operand) -> list[jax.Array]:
    """Casts to the dtype of the result, or to float32 if that is a 16-bit float."""
    return [widen(jnp.asarray(value, call.dtype)) for value in values]


@register_lowering(aten.add.Tensor, aten.add.Scalar)
def _add(call: Call, x: Operand, y: Operand, alpha: Scalar = 1) -> jax.Array:
    x, y = operands(call, x, y)
    return x + y if alpha == 1 else x + y * alpha


@register_lowering(aten.sub.Tensor, aten.sub.Scalar)
def _sub(call: Call, x: Operand, y: Operand, alpha: Scalar = 1) -> jax.Array:
    x, y = operands(call, x, y)
    return x - y if alpha == 1 else x - y * alpha


@register_lowering(aten.rsub.Tensor, aten.rsub.Scalar)
def _rsub(call: Call, x: Operand, y: Operand, alpha: Scalar = 1) -> jax.Array:
    return _sub(call, y, x, alpha)


@register_lowering(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div_mode(call: Call, x: Operand, y: Operand, rounding_mode: str | None = None) -> jax.Array:
    x, y = operands(call, x, y)
    if rounding_mode is None:
        return x / y
    x, y = lax.stop_gradient(x), lax.stop_gradient(y)
    if rounding_mode == "floor":
        return jnp.floor_divide(x, y)
    quotient = lax.div(*jnp.broadcast_arrays(x, y))
    return jnp.trunc(quotient) if jnp.issubdtype(quotient.dtype, jnp.floating) else quotient


@register_lowering(aten.floor_divide.default, aten.floor_divide.Scalar)
def _floor_divide(call: Call, x: Operand, y: Operand) -> jax.Array:
    return _div_mode(call, x, y, "floor")


@register_lowering(aten.pow.Tensor_Scalar)
def _pow_scalar(call: Call, x: jax.Array, exponent: Scalar) -> jax.Array:
    (x,) = operands(call, x)
    if exponent == 0.5:
        return jnp.sqrt(x)
    if exponent == int(exponent) and abs(exponent) <= 8:
        return lax.integer_pow(x, int(exponent))
    return jnp.power(x, jnp.full_like(x, exponent))


@register_lowering(aten.pow.Tensor_Tensor, aten.pow.Scalar)
def _pow_tensor(call: Call, x: Operand, exponent: jax.Array) -> jax.Array:
    x, exponent = operands(call, x, exponent)
    # JAX's gradient at 0**0 is NaN, torch's 0.
    return jnp.power(jnp.where((x == 0) & (exponent == 0), 1, x), exponent)


@register_lowering(
    aten.float_power.Tensor_Scalar, aten.float_power.Tensor_Tensor, aten.float_power.Scalar
)
def _float_power(call: Call, x: Operand, exponent: Operand) -> jax.Array:
    if isinstance(exponent, jax.Array):
        return _pow_tensor(call, x, exponent)
    return _pow_scalar(call, jnp.asarray(x, call.dtype), exponent)


@register_lowering(aten.lerp.Scalar, aten.lerp.Tensor)
def _lerp(call: Call, start: jax.Array, end: jax.Array, weight: Operand) -> jax.Array:
    start, end, weight = operands(call, start, end, weight)
    return jnp.where(
        jnp.abs(weight) < 0.5,
        start + weight * (end - start),
        end - (end - start) * (1 - weight),
    )


@register_lowering(aten.addcmul.default)
def _addcmul(call: Call, x: jax.Array, a: jax.Array, b: jax.Array, value: Scalar = 1) -> jax.Array:
    x, a, b = operands(call, x, a, b)
    return x + value * a * b


@register_lowering(aten.addcdiv.default)
def _addcdiv(call: Call, x: jax.Array, a: jax.Array, b: jax.Array, value: Scalar = 1) -> jax.Array:
    x, a, b = operands(call, x, a, b)
    return x + value * (a / b)


@register_lowering(aten.logit.default)
def _logit(call: Call, x: jax.Array, eps: float | None = None) -> jax.Array:
    (x,) = operands(call, x)
    if eps is not None:
        x = jnp.where(x < eps, eps, jnp.where(x > 1 - eps, 1 - eps, x))
    return jnp.log(x / (1 - x))


@register_lowering(aten.round.decimals)
def _round_decimals(call: Call, x: jax.Array, decimals: int) -> jax.Array:
    return jnp.round(x * 10.0**decimals) / 10.0**decimals


@register_lowering(aten.isclose.default)
def _isclose(
    call: Call,
    x: jax.Array,
    y: jax.Array,
    rtol: float = 1e-5,
    atol: float = 1e-8,
    equal_nan: bool = False,
) -> jax.Array:
    x, y = promote(x, y)
    return jnp.isclose(x, y, rtol, atol, equal_nan)


@register_lowering(
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    is_alias=shares_memory,
)
def _to(call: Call, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    # A view must not cast: the interpreter also sends positions through it.
    return x if shares_memory(call.node) else x.astype(call.dtype)


@register_lowering(aten._to_copy.default)
def _to_copy(call: Call, x: jax.Array, **kwargs: Any) -> jax.Array:
    return x.astype(call.dtype)


def _register_unary(op: Any, function: Callable[[jax.Array], jax.Array]) -> None:
    @register_lowering(op)
    def unary(call: Call, x: jax.Array) -> jax.Array:
        return function(*operands(call, x))


def _register_binary(op: Any, function: Callable[..., jax.Array]) -> None:
    @register_lowering(op)
    def binary(call: Call, x: Operand, y: Operand) -> jax.Array:
        return function(*operands(call, x, y))


def _register_test(op: Any, function: Callable[..., jax.Array]) -> None:
    """Ops whose result has another type than what they compare."""

    @register_lowering(op)
    def test(call: Call, *operands: Operand) -> jax.Array:
        return function(*promote(*operands))


def _register_logical(op: Any, function: Callable[..., jax.Array]) -> None:
    @register_lowering(op)
    def logical(call: Call, *operands: jax.Array) -> jax.Array:
        return function(*(operand.astype(bool) for operand in operands))


_UNARY: dict[str, Callable[..., jax.Array]] = {
    "abs": absolute,
    "acos": jnp.arccos,
    "acosh": jnp.arccosh,
    "asin": jnp.arcsin,
    "asinh": jnp.arcsinh,
    "atan": jnp.arctan,
    "atanh": jnp.arctanh,
    "bitwise_not": jnp.bitwise_not,
    "ceil": jnp.ceil,
    "cos": jnp.cos,
    "cosh": jnp.cosh,
    "deg2rad": jnp.deg2rad,
    "digamma": special.digamma,
    "erf": special.erf,
    "erfc": special.erfc,
    "erfinv": special.erfinv,
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "floor": jnp.floor,
    "frac": lambda x: x - jnp.trunc(x),
    "lgamma": special.gammaln,
    "log": jnp.log,
    "log10": jnp.log10,
    "log1p": jnp.log1p,
    "log2": jnp.log2,
    "neg": jnp.negative,
    "positive": lambda x: x,
    "rad2deg": jnp.rad2deg,
    "reciprocal": lambda x: 1 / x,
    "round": jnp.round,
    "rsqrt": lax.rsqrt,
    "sgn": jnp.sign,
    "sigmoid": jax.nn.sigmoid,
    "sign": jnp.sign,
    "sin": jnp.sin,
    "sinh": jnp.sinh,
    "sqrt": jnp.sqrt,
    "square": jnp.square,
    "tan": jnp.tan,
    "tanh": jnp.tanh,
    "trunc": jnp.trunc,
}
_BINARY: dict[str, Callable[..., jax.Array]] = {
    "__and__": jnp.bitwise_and,
    "__or__": jnp.bitwise_or,
    "__xor__": jnp.bitwise_xor,
    "atan2": jnp.arctan2,
    "bitwise_and": jnp.bitwise_and,
    "bitwise_or": jnp.bitwise_or,
    "bitwise_xor": jnp.bitwise_xor,
    "div": jnp.divide,
    "fmod": jnp.fmod,
    "hypot": jnp.hypot,
    "logaddexp": jnp.logaddexp,
    "logaddexp2": jnp.logaddexp2,
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    "mul": jnp.multiply,
    "remainder": jnp.remainder,
    "xlogy": special.xlogy,
}
_OVERLOADS = {"default", "Tensor", "Scalar", "Scalar_Tensor", "Scalar_Self", "Scalar_Other"}
_COMPARISONS: dict[str, Callable[..., jax.Array]] = {
    "eq": jnp.equal,
    "ne": jnp.not_equal,
    "lt": jnp.less,
    "le": jnp.less_equal,
    "gt": jnp.greater,
    "ge": jnp.greater_equal,
}
_TESTS: dict[str, Callable[..., jax.Array]] = {
    "isfinite": jnp.isfinite,
    "isinf": jnp.isinf,
    "isnan": jnp.isnan,
    "isposinf": jnp.isposinf,
    "isneginf": jnp.isneginf,
    "signbit": jnp.signbit,
}
_LOGICAL: dict[str, Callable[..., jax.Array]] = {
    "logical_and": jnp.logical_and,
    "logical_not": jnp.logical_not,
    "logical_or": jnp.logical_or,
    "logical_xor": jnp.logical_xor,
}

for _name, _function in _UNARY.items():
    _register_unary(getattr(aten, _name).default, _function)
for _name, _function in _BINARY.items():
    for _overload in _OVERLOADS.intersection(getattr(aten, _name).overloads()):
        _register_binary(getattr(getattr(aten, _name), _overload), _function)
_register_binary(aten.max.other, jnp.maximum)
_register_binary(aten.min.other, jnp.minimum)
for _name, _function in _COMPARISONS.items():
    _register_test(getattr(aten, _name).Tensor, _function)
    _register_test(getattr(aten, _name).Scalar, _function)
for _name, _function in _TESTS.items():
    _register_test(getattr(aten, _name).default, _function)
for _name, _function in _LOGICAL.items():
    _register_logical(getattr(aten, _name).default, _function)
