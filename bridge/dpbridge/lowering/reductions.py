"""Sums, means, norms and extrema: what makes one number of many."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch

from dpbridge.lowering.dtypes import Scalar, widen
from dpbridge.lowering.elementwise import absolute
from dpbridge.lowering.table import Call, register_lowering

aten = torch.ops.aten

Dims = int | Sequence[int] | None


def axes_of(x: jax.Array, dims: Dims) -> tuple[int, ...]:
    """Returns the axes that torch means by `dims`, where None and () are all of them."""
    if dims is None or dims == () or dims == [] or x.ndim == 0:
        return tuple(range(x.ndim))
    return tuple(dim % x.ndim for dim in ([dims] if isinstance(dims, int) else dims))


def safe_sqrt(square: jax.Array) -> jax.Array:
    """Returns the square root, whose gradient at 0 is 0 as that of torch's norms."""
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def vector_norm(x: jax.Array, order: Scalar, dims: Dims, keepdim: bool = False) -> jax.Array:
    """Returns the norm of that order over `dims`."""
    axes = axes_of(x, dims)
    size = absolute(x)
    if order == 0:
        return jnp.sum((x != 0).astype(x.dtype), axes, keepdims=keepdim)
    if order == 1:
        return jnp.sum(size, axes, keepdims=keepdim)
    if order == 2:
        return safe_sqrt(jnp.sum(jnp.square(x), axes, keepdims=keepdim))
    if abs(order) == float("inf"):
        extremum = jnp.max if order > 0 else jnp.min
        return extremum(size, axes, keepdims=keepdim)
    is_zero = size == 0
    powers = jnp.where(is_zero, 0 if order > 0 else jnp.inf, jnp.where(is_zero, 1, size) ** order)
    total = jnp.sum(powers, axes, keepdims=keepdim)
    is_zero = total == 0
    return jnp.where(is_zero, 0, jnp.where(is_zero, 1, total) ** (1 / order))


@register_lowering(aten.sum.default, aten.sum.dim_IntList)
def _sum(
    call: Call, x: jax.Array, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None
) -> jax.Array:
    return jnp.sum(x.astype(call.dtype), axes_of(x, dim), keepdims=keepdim)


@register_lowering(aten.nansum.default)
def _nansum(
    call: Call, x: jax.Array, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None
) -> jax.Array:
    return _sum(call, jnp.where(jnp.isnan(x), 0, x), dim, keepdim)


@register_lowering(aten.mean.default, aten.mean.dim)
def _mean(
    call: Call, x: jax.Array, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None
) -> jax.Array:
    return jnp.mean(x.astype(call.dtype), axes_of(x, dim), keepdims=keepdim)


@register_lowering(aten.prod.default)
def _prod(call: Call, x: jax.Array, *, dtype: Any = None) -> jax.Array:
    return jnp.prod(x.astype(call.dtype))


@register_lowering(aten.prod.dim_int)
def _prod_dim(
    call: Call, x: jax.Array, dim: int, keepdim: bool = False, *, dtype: Any = None
) -> jax.Array:
    return jnp.prod(x.astype(call.dtype), axes_of(x, dim), keepdims=keepdim)


def variance_and_mean(
    x: jax.Array, dims: Dims, correction: Scalar | None, keepdim: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns variance and mean over `dims`; no correction given is Bessel's."""
    x, axes = widen(x), axes_of(x, dims)
    center = jnp.mean(x, axes, keepdims=True)
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    freedom = max(count - (1 if correction is None else correction), 0)
    squares = jnp.sum(jnp.square(x - center), axes, keepdims=keepdim)
    return squares / freedom, center if keepdim else jnp.squeeze(center, axes)


def _register_spread(name: str, function: Callable[[jax.Array, jax.Array], Any]) -> None:
    op = getattr(aten, name)

    @register_lowering(op.default)
    def spread(call: Call, x: jax.Array, unbiased: bool = True) -> Any:
        return function(*variance_and_mean(x, None, int(unbiased), False))

    @register_lowering(op.dim)
    def spread_dim(
        call: Call, x: jax.Array, dim: Dims, unbiased: bool = True, keepdim: bool = False
    ) -> Any:
        return function(*variance_and_mean(x, dim, int(unbiased), keepdim))

    @register_lowering(op.correction)
    def spread_correction(
        call: Call,
        x: jax.Array,
        dim: Dims = None,
        *,
        correction: Scalar | None = None,
        keepdim: bool = False,
    ) -> Any:
        return function(*variance_and_mean(x, dim, correction, keepdim))


_register_spread("var", lambda variance, mean: variance)
_register_spread("std", lambda variance, mean: safe_sqrt(variance))
_register_spread("var_mean", lambda variance, mean: (variance, mean))
_register_spread("std_mean", lambda variance, mean: (safe_sqrt(variance), mean))


def _register_all_of(op: Any, function: Callable[..., jax.Array]) -> None:
    """`op(x, dims, keepdim)`; where values are equal, they share the gradient."""

    @register_lowering(*(getattr(op, name) for name in ("default", "dims") if hasattr(op, name)))
    def reduce(call: Call, x: jax.Array, dim: Dims = None, keepdim: bool = False) -> jax.Array:
        return function(x, axes_of(x, dim), keepdims=keepdim)


_register_all_of(aten.amax, jnp.max)
_register_all_of(aten.amin, jnp.min)
_register_all_of(aten.any, jnp.any)
_register_all_of(aten.all, jnp.all)
register_lowering(aten.max.default)(lambda call, x: jnp.max(x))
register_lowering(aten.min.default)(lambda call, x: jnp.min(x))


@register_lowering(aten.any.dim)
def _any_dim(call: Call, x: jax.Array, dim: int, keepdim: bool = False) -> jax.Array:
    return jnp.any(x, axes_of(x, dim), keepdims=keepdim)


@register_lowering(aten.all.dim)
def _all_dim(call: Call, x: jax.Array, dim: int, keepdim: bool = False) -> jax.Array:
    return jnp.all(x, axes_of(x, dim), keepdims=keepdim)


@register_lowering(aten.aminmax.default)
def _aminmax(
    call: Call, x: jax.Array, *, dim: int | None = None, keepdim: bool = False
) -> tuple[jax.Array, jax.Array]:
    axes = axes_of(x, dim)
    return jnp.min(x, axes, keepdims=keepdim), jnp.max(x, axes, keepdims=keepdim)


def pick(x: jax.Array, index: jax.Array, dim: int, keepdim: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the values at `index` (of size 1 along `dim`), which get the gradient; and it."""
    values = jnp.take_along_axis(x, index, dim)
    return (values, index) if keepdim else (values.squeeze(dim), index.squeeze(dim))


def _register_arg(name: str, function: Callable[..., jax.Array], op_dim: Any) -> None:
    @register_lowering(getattr(aten, f"arg{name}").default)
    def arg(call: Call, x: jax.Array, dim: int | None = None, keepdim: bool = False) -> jax.Array:
        return function(x, axis=dim, keepdims=keepdim) if x.ndim else jnp.zeros((), jnp.int64)

    @register_lowering(op_dim)
    def value_and_arg(
        call: Call, x: jax.Array, dim: int, keepdim: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        if x.ndim == 0:
            return x, jnp.zeros((), jnp.int64)
        return pick(x, function(x, axis=dim, keepdims=True), dim, keepdim)


_register_arg("max", jnp.argmax, aten.max.dim)
_register_arg("min", jnp.argmin, aten.min.dim)


@register_lowering(aten.logsumexp.default)
def _logsumexp(call: Call, x: jax.Array, dim: Dims, keepdim: bool = False) -> jax.Array:
    return jax.nn.logsumexp(widen(x.astype(call.dtype)), axes_of(x, dim), keepdims=keepdim)


def _register_softmax(name: str, function: Callable[..., jax.Array]) -> None:
    @register_lowering(getattr(aten, name).int)
    def softmax(call: Call, x: jax.Array, dim: int, dtype: Any = None) -> jax.Array:
        x = widen(x.astype(call.dtype))
        return function(x.reshape(x.shape or (1,)), axis=dim).reshape(x.shape)


_register_softmax("softmax", jax.nn.softmax)
_register_softmax("log_softmax", jax.nn.log_softmax)


@register_lowering(aten.linalg_vector_norm.default)
def _linalg_vector_norm(
    call: Call,
    x: jax.Array,
    ord: Scalar = 2,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> jax.Array:
    return vector_norm(widen(x.astype(call.dtype)), ord, dim, keepdim)


@register_lowering(aten.norm.ScalarOpt_dim)
def _norm(
    call: Call, x: jax.Array, p: Scalar | None, dim: Dims, keepdim: bool = False
) -> jax.Array:
    return vector_norm(widen(x), 2 if p is None else p, dim, keepdim)


@register_lowering(aten.norm.Scalar)
def _norm_scalar(call: Call, x: jax.Array, p: Scalar = 2) -> jax.Array:
    return vector_norm(widen(x), p, None)


@register_lowering(aten.linalg_norm.default)
def _linalg_norm(
    call: Call,
    x: jax.Array,
    ord: Scalar | None = None,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> jax.Array:
    if ord is not None and len(axes_of(x, dim)) != 1:
        raise call.refuse("matrix norms other than Frobenius' have no rule.")
    return _linalg_vector_norm(call, x, 2 if ord is None else ord, dim, keepdim)


@register_lowering(aten.linalg_norm.ord_str, aten.linalg_matrix_norm.str_ord)
def _matrix_norm(
    call: Call,
    x: jax.Array,
    ord: str = "fro",
    dim: Dims = (-2, -1),
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> jax.Array:
    if ord != "fro":
        raise call.refuse(f"ord must be 'fro', got {ord!r}.")
    return _linalg_vector_norm(call, x, 2, (-2, -1) if dim is None else dim, keepdim)


@register_lowering(aten.cumsum.default)
def _cumsum(call: Call, x: jax.Array, dim: int, *, dtype: Any = None) -> jax.Array:
    return jnp.cumsum(x.astype(call.dtype), dim) if x.ndim else x


@register_lowering(aten.cumprod.default)
def _cumprod(call: Call, x: jax.Array, dim: int, *, dtype: Any = None) -> jax.Array:
    return jnp.cumprod(x.astype(call.dtype), dim) if x.ndim else x


@register_lowering(aten.diff.default)
def _diff(
    call: Call,
    x: jax.Array,
    n: int = 1,
    dim: int = -1,
    prepend: jax.Array | None = None,
    append: jax.Array | None = None,
) -> jax.Array:
    before, after = (
        None if part is None else part.astype(call.dtype) for part in (prepend, append)
    )
    return jnp.diff(x.astype(call.dtype), n, dim, before, after)


@register_lowering(aten.count_nonzero.default, aten.count_nonzero.dim_IntList)
def _count_nonzero(call: Call, x: jax.Array, dim: Dims = None) -> jax.Array:
    return jnp.sum((x != 0).astype(jnp.int64), axes_of(x, dim))
