"""Evaluate convolutions with features last, the layout in which XLA is fast on a CPU."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives

from dpkernels._compat import bind

# Fewer input features than this are slower than as many: 8.6 against 3.2 ms for three of 32 by 32.
_FEATURES = 4


def bind_for(platform: str, batch_size: int) -> Callable[[Any, list[Any]], list[Any]]:
    """Returns how equations of one example of so many are evaluated on a platform."""
    if platform != "cpu":
        return bind

    def bind_local(eqn: Any, operands: list[Any]) -> list[Any]:
        if eqn.primitive is not primitives.conv_general_dilated_p:
            return bind(eqn, operands)
        return _by_patches(eqn, operands) if _is_deep(eqn, batch_size) else _direct(eqn, operands)

    return bind_local


def _is_deep(eqn: Any, batch_size: int) -> bool:
    """Returns whether the kernel, in torch's order, is larger than the patches it is applied to.

    XLA would transpose it for the convolution, and for its derivative again: for 512 features on
    4 by 4, both of them more than the rest takes.
    """
    params, (_, kernel) = eqn.params, (var.aval.shape for var in eqn.invars)
    numbers, out = params["dimension_numbers"], eqn.outvars[0].aval.shape
    rows = batch_size * math.prod(out) // out[numbers.out_spec[1]]
    return bool(
        kernel[0] >= rows
        and numbers.rhs_spec == tuple(range(len(kernel)))
        and params["feature_group_count"] == params["batch_group_count"] == 1
        and params["preferred_element_type"] in (None, eqn.outvars[0].aval.dtype)
    )


def _by_patches(eqn: Any, operands: list[Any]) -> list[Any]:
    params = eqn.params
    lhs, _, out = params["dimension_numbers"]
    x, w = operands
    x = x.transpose(lhs[0], *lhs[2:], lhs[1])
    x = _padded(x, params["padding"], params["lhs_dilation"])
    size = [eqn.outvars[0].aval.shape[axis] for axis in out[2:]]
    views = windows(w.shape[2:], params["window_strides"], params["rhs_dilation"], size)
    patches = jnp.stack([x[(slice(None), *view)] for view in views], -1)
    left = patches.reshape(*patches.shape[:-2], -1)
    y = lax.dot_general(
        left,
        w.reshape(w.shape[0], -1),
        (((left.ndim - 1,), (1,)), ((), ())),
        precision=params["precision"],
    )
    return [y.transpose(_behind(out))]


def windows(
    kernel: Sequence[int], strides: Sequence[int], steps: Sequence[int], out: Sequence[int]
) -> Iterator[tuple[slice, ...]]:
    """Yields, for each place of a kernel, which of the padded input it meets.

    Args:
        kernel: Its sizes.
        strides: How far apart its positions are.
        steps: How far apart its places are.
        out: How many positions it takes.
    """
    for offset in itertools.product(*(range(size) for size in kernel)):
        yield tuple(
            slice(at * step, at * step + stride * (size - 1) + 1, stride)
            for at, step, stride, size in zip(offset, steps, strides, out, strict=True)
        )


def _behind(out: Sequence[int]) -> list[int]:
    """Returns the transposition that brings features-last axes to where a program has them."""
    last = [out[0], *out[2:], out[1]]
    return sorted(range(len(last)), key=last.__getitem__)


def _direct(eqn: Any, operands: list[Any]) -> list[Any]:
    params = eqn.params
    padding = params["padding"]
    lhs, rhs, out = params["dimension_numbers"]
    rank = len(lhs) - 2
    x, w = operands
    x = x.transpose(lhs[0], *lhs[2:], lhs[1])
    w = w.transpose(*rhs[2:], rhs[1], rhs[0])
    if x.shape[-1] < _FEATURES and params["feature_group_count"] == 1:
        missing = _FEATURES - x.shape[-1]
        x = jnp.pad(x, [(0, 0)] * (rank + 1) + [(0, missing)])
        w = jnp.pad(w, [(0, 0)] * rank + [(0, missing), (0, 0)])
    space = "DHW"[3 - rank :] if rank <= 3 else None
    if space is None:
        return bind(eqn, operands)
    if any(low < 0 or high < 0 for low, high in padding):
        # XLA on a CPU reads beside the input, maybe another example's (openxla/xla#48713).
        x = _padded(x, padding, params["lhs_dilation"])
        padding, dilation = [(0, 0)] * rank, (1,) * rank
    else:
        dilation = params["lhs_dilation"]
    last = f"N{space}C"
    y = lax.conv_general_dilated(
        x,
        w,
        params["window_strides"],
        padding,
        dilation,
        params["rhs_dilation"],
        (last, f"{space}IO", last),
        params["feature_group_count"],
        params["batch_group_count"],
        params["precision"],
        params["preferred_element_type"],
    )
    return [y.transpose(_behind(out))]


def _padded(x: jax.Array, padding: Any, dilation: Any) -> jax.Array:
    widths = [(low, high, step - 1) for (low, high), step in zip(padding, dilation, strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *widths, (0, 0, 0)])
