"""Evaluate convolutions with features last, the layout in which XLA is fast on a CPU."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives

from dpkernels._compat import bind

# Fewer input features than this are slower than as many: 8.6 against 3.2 ms for three of 32 by 32.
_FEATURES = 4


def bind_for(platform: str) -> Callable[[Any, list[Any]], list[Any]]:
    """Returns how equations are evaluated on a platform."""
    return _features_last if platform == "cpu" else bind


def _features_last(eqn: Any, operands: list[Any]) -> list[Any]:
    if eqn.primitive is not primitives.conv_general_dilated_p:
        return bind(eqn, operands)
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
    back = [0] * (rank + 2)
    for position, axis in enumerate((out[0], *out[2:], out[1])):
        back[axis] = position
    return [y.transpose(back)]


def _padded(x: jax.Array, padding: Any, dilation: Any) -> jax.Array:
    widths = [(low, high, step - 1) for (low, high), step in zip(padding, dilation, strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *widths, (0, 0, 0)])
