"""Random numbers that forward draws itself: fresh for each example and step.

Dropout can be turned off, and is, to compare gradients with torch's. What is drawn has no such
state. There, torch and JAX take the same fixed numbers instead: `fixed_numbers`, which
`dpbridge.fixed_draws` puts in their place in torch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from dpbridge.dtypes import to_jax_dtype
from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten


@dataclass(frozen=True)
class Standard:
    """A distribution without parameters, and fixed numbers that stand for draws from it.

    Attributes:
        draw: From a key, a shape and a dtype to an array.
        fixed: From numbers spread evenly over (0, 1) to some that look like draws.
        start: The first of those: what stands for the only draw of an example.
    """

    draw: Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
    fixed: Callable[[Any], Any]
    start: float


@dataclass(frozen=True)
class Draw:
    """What an op draws.

    Attributes:
        standard: The distribution.
        transform: From numbers of it and the op's positional arguments to the op's result; of
            operators and methods that JAX's arrays and torch's tensors both have.
        is_integral: Whether the result is int64 where the op is not told another dtype.
    """

    standard: Standard
    transform: Callable[..., Any]
    is_integral: bool = False

    def dtype(self, result: torch.dtype) -> torch.dtype:
        """Returns the dtype in which to draw for a result of this one."""
        if self.standard is _CHANCE:
            return torch.float32
        return result if result.is_floating_point else torch.float64


def fixed_numbers(
    positions: Any,
    shape: tuple[int, ...],
    standard: Standard,
    dtype: torch.dtype,
    cast: Callable[[Any], Any],
) -> Any:
    """Returns what stands for draws: in torch and in JAX the same, to the last bit.

    Rows are alike, so that an example has the same numbers alone and together with others.

    Args:
        positions: 0, 1, ... in int64: an array of JAX or a tensor of torch.
        shape: Of the result.
        standard: What they are to look like.
        dtype: In which to draw.
        cast: Casts integers to that.
    """
    row = math.prod(shape[1:] if len(shape) > 1 else shape)
    turned = (positions % max(row, 1) * _GOLDEN + int(standard.start * 2**32)) & 0xFFFFFFFF
    # As many bits as the dtype has, so that none is rounded to 0 or 1.
    bits = 7 if dtype.itemsize == 2 else 23
    evenly = cast((turned >> (32 - bits)) * 2 + 1) * 2.0 ** -(bits + 1)
    return standard.fixed(evenly.reshape(shape))


_GOLDEN = 2654435769
"""2**32 divided by the golden ratio: its multiples, modulo 2**32, are spread evenly."""


def _exponential(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    # Never 0, of which F.gumbel_softmax takes the logarithm.
    smallest = jnp.finfo(dtype).tiny
    return -jnp.log(jax.random.uniform(key, shape, dtype, smallest))


# From a half on, what is kept more often than not is kept, whichever way that is written.
_UNIFORM = Standard(jax.random.uniform, lambda u: u, 0.5)
_CHANCE = Standard(jax.random.uniform, lambda u: u, 1 / 128)
_NORMAL = Standard(jax.random.normal, lambda u: (u - 0.5) * math.sqrt(12), 0.8)
_EXPONENTIAL = Standard(_exponential, lambda u: 2 * u, 0.7)


def _integer(u: Any, low: int, high: int) -> Any:
    return low + (high - low) * u // 1


DRAWS: dict[Any, Draw] = {
    aten.rand.default: Draw(_UNIFORM, lambda u, size: u),
    aten.rand_like.default: Draw(_UNIFORM, lambda u, x: u),
    aten.uniform.default: Draw(_UNIFORM, lambda u, x, a=0.0, b=1.0: a + (b - a) * u),
    aten.randint.default: Draw(_UNIFORM, lambda u, high, size: _integer(u, 0, high), True),
    aten.randint.low: Draw(_UNIFORM, lambda u, low, high, size: _integer(u, low, high), True),
    aten.randint_like.default: Draw(_UNIFORM, lambda u, x, high: _integer(u, 0, high)),
    aten.randint_like.low_dtype: Draw(_UNIFORM, lambda u, x, low, high: _integer(u, low, high)),
    aten.randperm.default: Draw(_UNIFORM, lambda u, n: u.argsort(), True),
    aten.bernoulli.default: Draw(_CHANCE, lambda u, p: u < p),
    aten.bernoulli.p: Draw(_CHANCE, lambda u, x, p=0.5: u < p),
    aten.bernoulli.Tensor: Draw(_CHANCE, lambda u, x, p: u < p),
    aten.randn.default: Draw(_NORMAL, lambda z, size: z),
    aten.randn_like.default: Draw(_NORMAL, lambda z, x: z),
    aten.normal_.default: Draw(_NORMAL, lambda z, x, mean=0.0, std=1.0: mean + std * z),
    aten.normal.Tensor_float: Draw(_NORMAL, lambda z, mean, std=1.0: mean + std * z),
    aten.normal.float_Tensor: Draw(_NORMAL, lambda z, mean, std: mean + std * z),
    aten.normal.Tensor_Tensor: Draw(_NORMAL, lambda z, mean, std: mean + std * z),
    aten.normal.float_float: Draw(_NORMAL, lambda z, mean, std, size: mean + std * z),
    aten.exponential.default: Draw(_EXPONENTIAL, lambda e, x, rate=1.0: e / rate),
}
"""What ops draw; one that writes in place stands under its functional variant if it has one."""


def _register(op: Any, draw: Draw) -> None:
    @register_lowering(op)
    def rule(call: Call, *args: Any, **kwargs: Any) -> jax.Array:
        numbers = _numbers(call, draw)
        return jnp.asarray(draw.transform(numbers, *(_as_in(numbers, arg) for arg in args)))


def _numbers(call: Call, draw: Draw) -> jax.Array:
    dtype = draw.dtype(call.result.dtype)
    own = to_jax_dtype(dtype)
    positions = jnp.arange(math.prod(call.shape), dtype=jnp.int64)
    fixed = fixed_numbers(positions, call.shape, draw.standard, dtype, lambda x: x.astype(own))
    return jnp.where(call.randomness, draw.standard.draw(call.key(), call.shape, own), fixed)


def _as_in(numbers: jax.Array, argument: Any) -> Any:
    """Casts a tensor of parameters of the distribution. Their gradients are 0, as in torch."""
    if isinstance(argument, jax.Array):
        return lax.stop_gradient(argument).astype(numbers.dtype)
    return argument


for _op, _draw in DRAWS.items():
    _register(_op, _draw)
