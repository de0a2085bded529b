"""Rewrite a program so that what lies between convolutions stays with features last.

A CPU convolves features-last arrays alone. A program that has them elsewhere, as torch's do, would
be transposed before and behind every convolution; here the axes stay as a convolution left them for
as long as what follows does not care.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.extend.core as jexc
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives

from dpkernels._compat import bind, inner_jaxpr

_ELEMENTWISE = frozenset(
    {
        primitives.abs_p,
        primitives.add_p,
        primitives.and_p,
        primitives.atan2_p,
        primitives.ceil_p,
        primitives.clamp_p,
        primitives.convert_element_type_p,
        primitives.copy_p,
        primitives.cos_p,
        primitives.div_p,
        primitives.eq_p,
        primitives.erf_p,
        primitives.exp_p,
        primitives.exp2_p,
        primitives.expm1_p,
        primitives.floor_p,
        primitives.ge_p,
        primitives.gt_p,
        primitives.integer_pow_p,
        primitives.is_finite_p,
        primitives.le_p,
        primitives.log_p,
        primitives.log1p_p,
        primitives.logistic_p,
        primitives.lt_p,
        primitives.max_p,
        primitives.min_p,
        primitives.mul_p,
        primitives.ne_p,
        primitives.neg_p,
        primitives.not_p,
        primitives.or_p,
        primitives.pow_p,
        primitives.rem_p,
        primitives.round_p,
        primitives.rsqrt_p,
        primitives.select_n_p,
        primitives.sign_p,
        primitives.sin_p,
        primitives.sqrt_p,
        primitives.square_p,
        primitives.stop_gradient_p,
        primitives.sub_p,
        primitives.tan_p,
        primitives.tanh_p,
        primitives.xor_p,
    }
)
_REDUCTIONS = frozenset(
    {
        primitives.reduce_sum_p,
        primitives.reduce_max_p,
        primitives.reduce_min_p,
        primitives.reduce_prod_p,
        primitives.reduce_and_p,
        primitives.reduce_or_p,
    }
)


_FEW = 8  # Neighbours that are summed at once; a longer loop is not unrolled, and slow.


@dataclass(frozen=True)
class _Turned:
    """An array whose axes stand in another order: axis i is axis `order[i]` of what is meant."""

    array: jax.Array
    order: tuple[int, ...]

    def straight(self) -> jax.Array:
        """Returns what is meant."""
        return self.array.transpose(_inverse(self.order))


_Operands: TypeAlias = list[Any]
_Rule: TypeAlias = Callable[[Any, _Operands], list[Any]]


def features_last(closed: jexc.ClosedJaxpr) -> jexc.ClosedJaxpr:
    """Returns a program with the same results.

    Args:
        closed: The program. It is returned as it is if it has nothing to convolve at its top level.
    """
    if not _convolves(closed.jaxpr):
        return closed
    avals = [jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type) for x in closed.in_avals]
    return jax.make_jaxpr(lambda *inputs: [_straight(x) for x in _evaluate(closed, inputs)])(*avals)


def _convolves(jaxpr: Any) -> bool:
    return any(
        eqn.primitive is primitives.conv_general_dilated_p
        or (eqn.primitive is primitives.jit_p and _convolves(inner_jaxpr(eqn).jaxpr))
        for eqn in jaxpr.eqns
    )


def _evaluate(closed: jexc.ClosedJaxpr, inputs: Sequence[Any]) -> list[Any]:
    env: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(closed.jaxpr.invars, inputs, strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, jexc.Literal) else env[var]

    for eqn in closed.jaxpr.eqns:
        operands = [read(var) for var in eqn.invars]
        env.update(zip(eqn.outvars, _apply(eqn, operands), strict=True))
    return [read(var) for var in closed.jaxpr.outvars]


def _apply(eqn: Any, operands: _Operands) -> list[Any]:
    if eqn.primitive is primitives.jit_p and (
        any(isinstance(x, _Turned) for x in operands) or _convolves(inner_jaxpr(eqn).jaxpr)
    ):
        return _evaluate(inner_jaxpr(eqn), operands)
    if eqn.primitive is primitives.conv_general_dilated_p:
        return _convolution(eqn, operands)
    turned = [x for x in operands if isinstance(x, _Turned)]
    rule = _RULES.get(eqn.primitive)
    if turned and rule is not None:
        return rule(eqn, operands)
    return bind(eqn, [_straight(x) for x in operands])


def _straight(value: Any) -> Any:
    return value.straight() if isinstance(value, _Turned) else value


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _turned(array: jax.Array, order: Sequence[int]) -> Any:
    return array if list(order) == sorted(order) else _Turned(array, tuple(order))


def _in_order(value: Any, order: tuple[int, ...]) -> Any:
    """Returns the array with its axes in this order; scalars, which have none, as they are."""
    if isinstance(value, _Turned):
        return value.array if value.order == order else value.straight().transpose(order)
    return value if jnp.ndim(value) == 0 else jnp.transpose(value, order)


def _with(eqn: Any, operands: _Operands, **params: Any) -> jax.Array:
    """Evaluates the equation with some of its parameters replaced."""
    return eqn.primitive.bind(*operands, **{**eqn.params, **params})


def _convolution(eqn: Any, operands: _Operands) -> list[Any]:
    x, w = operands
    lhs, rhs, out = eqn.params["dimension_numbers"]
    rank = len(lhs) - 2
    order, back = ((spec[0], *spec[2:], spec[1]) for spec in (lhs, out))
    last = (0, rank + 1, *range(1, rank + 1))
    numbers = lax.ConvDimensionNumbers(last, rhs, last)
    y = _with(eqn, [_in_order(x, order), _straight(w)], dimension_numbers=numbers)
    return [_turned(y, back)]


def _elementwise(eqn: Any, operands: _Operands) -> list[Any]:
    order = next(x.order for x in operands if isinstance(x, _Turned))
    arrays = [_in_order(x, order) for x in operands]
    shape = tuple(eqn.outvars[0].aval.shape[axis] for axis in order)
    if eqn.primitive is primitives.mul_p:
        y = _product(eqn, arrays, shape)
    else:
        (y,) = bind(eqn, arrays)
    return [_turned(y, order)]


def _product(eqn: Any, operands: _Operands, shape: tuple[int, ...]) -> jax.Array:
    """Multiplies such that the derivative by what is broadcast is a sum in two steps.

    XLA needs up to ten times as long to sum a product over several axes at once, or over one that
    is far from the last. So the first step sums a few neighbours, and the barrier keeps the second
    one apart.
    """
    small, large = sorted(operands, key=jnp.size)
    lacking = [i for i, size in enumerate(shape) if jnp.ndim(small) and small.shape[i] < size]
    few = _divisor(shape[lacking[-1]]) if len(lacking) > 1 else None
    if few is None or large.shape != shape:
        return bind(eqn, operands)[0]
    at = lacking[-1]
    split = (*shape[:at], shape[at] // few, few, *shape[at + 1 :])
    each = lax.expand_dims(small, (at,))
    stretched = jnp.broadcast_to(each, (*split[: at + 1], 1, *split[at + 2 :]))
    return (large.reshape(split) * lax.optimization_barrier(stretched)).reshape(shape)


def _divisor(size: int) -> int | None:
    return next((few for few in range(_FEW, 1, -1) if size % few == 0), None)


def _reduction(eqn: Any, operands: _Operands) -> list[Any]:
    (x,) = operands
    axes = eqn.params["axes"]
    y = _with(eqn, [x.array], axes=tuple(sorted(x.order.index(axis) for axis in axes)))
    return [_without(y, x.order, axes)]


def _slice(eqn: Any, operands: _Operands) -> list[Any]:
    (x,) = operands
    names = ("start_indices", "limit_indices", "strides")
    given = {name: eqn.params[name] for name in names if eqn.params[name] is not None}
    y = _with(eqn, [x.array], **{k: tuple(v[i] for i in x.order) for k, v in given.items()})
    return [_Turned(y, x.order)]


def _pad(eqn: Any, operands: _Operands) -> list[Any]:
    x, value = operands
    if not isinstance(x, _Turned):
        return bind(eqn, [x, _straight(value)])
    widths = tuple(eqn.params["padding_config"][i] for i in x.order)
    y = _with(eqn, [x.array, value], padding_config=widths)
    return [_Turned(y, x.order)]


def _concatenate(eqn: Any, operands: _Operands) -> list[Any]:
    order = next(x.order for x in operands if isinstance(x, _Turned))
    arrays = [_in_order(x, order) for x in operands]
    y = _with(eqn, arrays, dimension=order.index(eqn.params["dimension"]))
    return [_Turned(y, order)]


def _transpose(eqn: Any, operands: _Operands) -> list[Any]:
    (x,) = operands
    back = _inverse(eqn.params["permutation"])
    return [_turned(x.array, [back[axis] for axis in x.order])]


def _squeeze(eqn: Any, operands: _Operands) -> list[Any]:
    (x,) = operands
    gone = eqn.params["dimensions"]
    y = jnp.squeeze(x.array, tuple(x.order.index(axis) for axis in gone))
    return [_without(y, x.order, gone)]


def _without(array: jax.Array, order: Sequence[int], gone: Sequence[int]) -> Any:
    kept = [axis for axis in order if axis not in gone]
    return _turned(array, [sorted(kept).index(axis) for axis in kept])


def _reshape(eqn: Any, operands: _Operands) -> list[Any]:
    """Splits axes where they stand, and puts those together that stand beside each other."""
    (x,) = operands
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if eqn.params["dimensions"] is not None or 0 in old:
        return bind(eqn, [x.straight()])
    order: list[int] = []
    for before, after in sorted(_parts(old, new), key=lambda part: x.order.index(part[0][0])):
        at = [x.order.index(axis) for axis in before]
        if at != list(range(at[0], at[0] + len(at))):
            return bind(eqn, [x.straight()])
        order += after
    return [_turned(x.array.reshape([new[axis] for axis in order]), order)]


def _parts(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Returns which axes become which; axes of size one join those around them."""
    parts: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        before, after, sizes = [i], [j], [old[i], new[j]]
        i, j = i + 1, j + 1
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                sizes[0] *= old[i]
                before.append(i)
                i += 1
            else:
                sizes[1] *= new[j]
                after.append(j)
                j += 1
        parts.append((before, after))
    if parts:
        parts[-1][0].extend(range(i, len(old)))
        parts[-1][1].extend(range(j, len(new)))
    return parts


_RULES: dict[Any, _Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    primitives.slice_p: _slice,
    primitives.pad_p: _pad,
    primitives.concatenate_p: _concatenate,
    primitives.transpose_p: _transpose,
    primitives.squeeze_p: _squeeze,
    primitives.reshape_p: _reshape,
}
