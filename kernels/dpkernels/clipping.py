"""Sums of clipped per-example gradients, with the sensitivity that noise is scaled by."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import dp_accounting
import jax
import jax.numpy as jnp

from dpkernels import _validate
from dpkernels.mixing import refuse_mixing
from dpkernels.per_example import Examples, sum_over_examples, sum_over_microbatches
from dpkernels.tapped.explain import Explanation
from dpkernels.tapped.gradient import TappedGradient
from dpkernels.tree_clipping import (
    check_clip_norm,
    clip_and_round_to_grid,
    clip_pytree,
    l2_norm,
    widest,
)

PyTree = Any
# Bytes of gradients that are formed together where the caller did not ask for them.
_MATERIALIZED_AT_ONCE = 256 * 2**20
STRATEGIES = ("auto", "gram", "product", "materialize")
NeighboringRelation: TypeAlias = dp_accounting.NeighboringRelation


class Aux(NamedTuple):
    """What comes beside a clipped gradient: per example, not private.

    Attributes:
        values: `(batch,)` losses, or None.
        grad_norms: `(batch,)` norms of the raw gradients, or None.
        aux: The function's own auxiliary output with a batch axis, or None.
    """

    values: Any
    grad_norms: Any
    aux: Any


@dataclass(frozen=True)
class BoundedSensitivityCallable:
    """A function of a batch whose value changes by a bounded amount when one example does.

    Attributes:
        bounded_sensitivity_fun: The function.
        l2_norm_bound: The most that one example can add to its value, in L2 norm.
        has_aux: Whether it returns `(value, aux)`. The bound is about `value` alone.
        explain_fun: What `explain` calls, or None.
        fast_fun: The function without what is seldom run, or None where there is no such thing;
            called alike. It returns `(result, needs_care)`: where that scalar is true, the result
            has no bound, must not be used, and the function itself is to be called.
    """

    bounded_sensitivity_fun: Callable[..., Any]
    l2_norm_bound: float
    has_aux: bool
    explain_fun: Callable[..., Explanation] | None = None
    fast_fun: Callable[..., tuple[Any, jax.Array]] | None = None

    def __call__(self, *args: Any, is_padding_example: jax.Array | None = None) -> Any:
        """Calls the function.

        Args:
            *args: Those of the function it was made from.
            is_padding_example: `(batch,)` bools; True rows contribute exactly zero.

        Raises:
            ValueError: If the rows of the batch, or of `is_padding_example`, do not agree.
        """
        return self.bounded_sensitivity_fun(*args, is_padding_example=is_padding_example)

    def explain(self, *args: Any) -> Explanation:
        """Says how norm and clipped sum of every parameter are found, and what that costs.

        Args:
            *args: Those of a call. Only shapes and types count.

        Returns:
            What prints as a table: each parameter, the equations that use it, the form chosen,
            floating point operations and bytes.

        Raises:
            NotImplementedError: If every gradient is materialised.
        """
        if self.explain_fun is None:
            raise NotImplementedError(
                "`explain` must be asked of a gradient that is taken apart; this one forms the "
                'value of every example. Use `clipped_grad` with strategy="auto", without '
                "`pre_clipping_transform`, `dtype` and `grid_scale`."
            )
        return self.explain_fun(*args)

    def sensitivity(
        self, neighboring_relation: NeighboringRelation = NeighboringRelation.REPLACE_SPECIAL
    ) -> float:
        """Returns the L2 sensitivity of the value.

        Args:
            neighboring_relation: Adding or removing an example, and zeroing it out, move the
                value by its bound; replacing it by twice that.

        Raises:
            ValueError: If the relation is none of these.
        """
        factors = {
            NeighboringRelation.ADD_OR_REMOVE_ONE: 1,
            NeighboringRelation.REPLACE_SPECIAL: 1,
            NeighboringRelation.REPLACE_ONE: 2,
        }
        _validate.one_of("neighboring_relation", neighboring_relation, factors)
        return factors[neighboring_relation] * self.l2_norm_bound


def clipped_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    l2_clip_norm: PyTree,
    rescale_to_unit_norm: bool = False,
    normalize_by: float = 1.0,
    batch_argnums: int | Sequence[int] = 1,
    keep_batch_dim: bool = True,
    return_values: bool = False,
    return_grad_norms: bool = False,
    pre_clipping_transform: Callable[[PyTree], PyTree] | None = None,
    microbatch_size: int | None = None,
    nan_safe: bool = True,
    dtype: Any = None,
    prng_argnum: int | None = None,
    spmd_axis_name: str | None = None,
    grid_scale: float | None = None,
    strategy: str = "auto",
) -> BoundedSensitivityCallable:
    """Makes a function that clips the gradient of every example and sums them.

    The signature and the semantics are those of JAX Privacy's function of this name.

    Args:
        fun: Returns a scalar loss, or `(loss, aux)` if `has_aux`. Called on one example (or one
            group of examples) at a time; no example can see another.
        argnums: The argument or arguments to differentiate, none of them in `batch_argnums`.
        has_aux: Whether `fun` returns `(loss, aux)`.
        l2_clip_norm: The bound on each gradient's L2 norm: a number, or a prefix tree of the
            gradient to clip layers each by itself. May be traced.
        rescale_to_unit_norm: Divides clipped gradients by the clip norm: the bound becomes 1.
        normalize_by: The sum is divided by this public number. Never the drawn batch size.
        batch_argnums: The arguments that have a batch axis, axis 0.
        keep_batch_dim: Whether `fun` sees an example with a leading axis of 1, or without it.
            Without it and with one more axis, clipping is per user.
        return_values: Whether to return the losses.
        return_grad_norms: Whether to return the norms of the gradients, before
            `pre_clipping_transform` and clipping.
        pre_clipping_transform: Applied to each gradient before it is clipped.
        microbatch_size: How many examples are held in memory at once. Changes no result.
        nan_safe: Whether an example whose gradient is not finite contributes zero.
        dtype: Gradients are cast to this type before they are clipped. They are clipped and
            summed in float64 if it is float64, or by default if they are, and otherwise in
            float32: the rounding of half precision would break the bound.
        prng_argnum: An argument that is a PRNG key: split, one for each example.
        spmd_axis_name: See `jax.vmap`.
        grid_scale: Rounds clipped gradients to integers, `grid_scale` steps to the clip norm.
        strategy: How norms and sums are found; changes no result. "auto" chooses the cheapest
            form for each parameter, "gram" and "product" force one where it applies,
            "materialize" forms every gradient. So do the others for a `pre_clipping_transform`,
            a `dtype` or a `grid_scale`, which need the gradients themselves; then in microbatches
            that fit into 256 MiB, unless `microbatch_size` says otherwise.

    Returns:
        A callable with the arguments of `fun` and `is_padding_example`. It returns the gradient's
        sum, or `(sum, Aux)` if `has_aux`, `return_values` or `return_grad_norms`.

    Raises:
        TypeError: If an argument has the wrong type, or gradients are complex.
        NotImplementedError: When called, if `fun` shows a whole batch to code that JAX does not
            see into: a `custom_vmap`, or a callback whose `vmap_method` says so.
        ValueError: If one is out of range, or arguments contradict each other.

    Guarantees:
        Adding, removing or zeroing out one example moves the sum by at most `sensitivity()` in L2
        norm; replacing one by at most twice that.
        A padding example contributes exactly zero, whatever it holds.
        With `nan_safe`, an example with a non-finite gradient contributes exactly zero.
        How an example is clipped depends on that example alone. (Numbers that are not finite may
        change in which order the others are added up.)
        `Aux` is per example: each row depends on its own example alone. It is not private.

    Source:
        Abadi et al. 2016, algorithm 1; rescaling: De et al. 2022, arXiv 2204.13650.

    Example:
        >>> def loss(w, x):
        ...     return jnp.sum(w * x)
        >>> total = clipped_grad(loss, l2_clip_norm=1.0)
        >>> total(jnp.zeros(2), jnp.array([[0.0, 4.0], [0.5, 0.0]])).tolist()
        [0.5, 1.0]
        >>> total.sensitivity()
        1.0
    """
    _check_argnums(argnums, batch_argnums)
    _validate.one_of("strategy", strategy, STRATEGIES)
    wants_aux = has_aux or return_values or return_grad_norms
    takes_gradients = (pre_clipping_transform, grid_scale, dtype) != (None, None, None)
    if strategy != "materialize" and not takes_gradients:
        return _tapped(
            _with_aux(fun, has_aux),
            argnums,
            strategy,
            l2_clip_norm=l2_clip_norm,
            rescale_to_unit_norm=rescale_to_unit_norm,
            normalize_by=normalize_by,
            batch_argnums=batch_argnums,
            keep_batch_dim=keep_batch_dim,
            returned=(return_values, return_grad_norms, has_aux),
            microbatch_size=microbatch_size,
            nan_safe=nan_safe,
            prng_argnum=prng_argnum,
            spmd_axis_name=spmd_axis_name,
        )
    if pre_clipping_transform is None:
        pre_clipping_transform = _identity
    value_and_grad = jax.value_and_grad(_with_aux(fun, has_aux), argnums, has_aux=True)

    def gradient(*args: Any) -> Any:
        (value, aux), raw = value_and_grad(*args)
        result = pre_clipping_transform(raw)
        if not wants_aux:
            return result
        norm = l2_norm(raw) if return_grad_norms else None
        return result, Aux(value if return_values else None, norm, aux if has_aux else None)

    def make(microbatch_size: int | None) -> BoundedSensitivityCallable:
        return clipped_fun(
            gradient,
            wants_aux,
            batch_argnums=batch_argnums,
            keep_batch_dim=keep_batch_dim,
            l2_clip_norm=l2_clip_norm,
            rescale_to_unit_norm=rescale_to_unit_norm,
            normalize_by=normalize_by,
            microbatch_size=microbatch_size,
            nan_safe=nan_safe,
            dtype=dtype,
            prng_argnum=prng_argnum,
            spmd_axis_name=spmd_axis_name,
            grid_scale=grid_scale,
        )

    if strategy == "materialize" or microbatch_size is not None:
        return make(microbatch_size)

    def in_microbatches(*args: Any, is_padding_example: jax.Array | None = None) -> Any:
        params = jax.tree.leaves([args[argnum] for argnum in _as_tuple(argnums)])
        size = 4 * sum(jnp.size(param) for param in params)
        total = make(max(1, _MATERIALIZED_AT_ONCE // max(1, size)))
        return total(*args, is_padding_example=is_padding_example)

    return dataclasses.replace(make(None), bounded_sensitivity_fun=in_microbatches)


def _tapped(
    loss: Callable[..., Any],
    argnums: int | Sequence[int],
    strategy: str,
    *,
    l2_clip_norm: PyTree,
    rescale_to_unit_norm: bool,
    normalize_by: float,
    batch_argnums: int | Sequence[int],
    keep_batch_dim: bool,
    returned: tuple[bool, bool, bool],
    microbatch_size: int | None,
    nan_safe: bool,
    prng_argnum: int | None,
    spmd_axis_name: str | None,
) -> BoundedSensitivityCallable:
    """Makes the function of `clipped_grad` that forms no gradient it need not."""
    wanted, batch_args = _as_tuple(argnums), _as_tuple(batch_argnums)
    normalize_by, microbatch_size = _check_sizes(normalize_by, microbatch_size)
    for bound in jax.tree.leaves(l2_clip_norm):
        check_clip_norm(bound)

    def prepare(args: Sequence[Any]) -> tuple[PyTree, Examples, TappedGradient]:
        examples = Examples(args, batch_args, prng_argnum, keep_batch_dim)

        def loss_of_example(params: tuple[PyTree, ...], row: PyTree) -> Any:
            filled = examples.arguments(row)
            for argnum, param in zip(wanted, params, strict=True):
                filled[argnum] = param
            return loss(*filled)

        params = tuple(jax.tree.map(jnp.asarray, args[argnum]) for argnum in wanted)
        params = params[0] if isinstance(argnums, int) else params
        at_once = min(examples.batch_size, microbatch_size or examples.batch_size)
        gradient = TappedGradient(
            loss_of_example
            if not isinstance(argnums, int)
            else lambda p, r: loss_of_example((p,), r),
            params,
            examples.row,
            batch_size=at_once,
            l2_clip_norm=l2_clip_norm,
            rescale_to_unit_norm=rescale_to_unit_norm,
            drops_nonfinite=nan_safe,
            strategy=strategy,
        )
        return params, examples, gradient

    def either(
        args: Sequence[Any], is_padding_example: jax.Array | None, is_careful: bool
    ) -> tuple[Any, jax.Array]:
        params, examples, gradient = prepare(args)
        is_padding = padding_mask(is_padding_example, examples.batch_size)
        value, (values, aux, norms, needs_care) = sum_over_microbatches(
            lambda rows, is_padding: gradient(
                params, rows, is_padding, spmd_axis_name, is_careful=is_careful
            ),
            examples.rows,
            is_padding,
            microbatch_size,
        )
        value = normalized(value, normalize_by)
        if not any(returned):
            return value, jnp.any(needs_care)
        if keep_batch_dim:
            aux = jax.tree.map(_drop_axis_1, aux)
        chosen = (
            x if wanted else None for x, wanted in zip((values, norms, aux), returned, strict=True)
        )
        return (value, Aux(*chosen)), jnp.any(needs_care)

    def summed(*args: Any, is_padding_example: jax.Array | None = None) -> Any:
        return either(args, is_padding_example, True)[0]

    def fast(*args: Any, is_padding_example: jax.Array | None = None) -> tuple[Any, jax.Array]:
        return either(args, is_padding_example, False)

    bound = norm_bound(l2_clip_norm, rescale_to_unit_norm, None) / normalize_by
    return BoundedSensitivityCallable(
        summed, bound, any(returned), lambda *args: prepare(args)[2].explain(), fast
    )


def clipped_fun(
    fun: Callable[..., Any],
    has_aux: bool = False,
    *,
    batch_argnums: int | Sequence[int] = 0,
    keep_batch_dim: bool = True,
    l2_clip_norm: PyTree = 1.0,
    rescale_to_unit_norm: bool = False,
    normalize_by: float = 1.0,
    return_norms: bool = False,
    microbatch_size: int | None = None,
    nan_safe: bool = True,
    dtype: Any = None,
    prng_argnum: int | None = None,
    spmd_axis_name: str | None = None,
    grid_scale: float | None = None,
) -> BoundedSensitivityCallable:
    """Makes a function that clips the value of `fun` for every example and sums them.

    `clipped_grad` is this function on gradients; see there for what is not described here.

    Args:
        fun: Returns a pytree of arrays, or `(value, aux)` if `has_aux`.
        has_aux: Whether `fun` returns `(value, aux)`; only the value is clipped.
        batch_argnums: See `clipped_grad`.
        keep_batch_dim: See `clipped_grad`.
        l2_clip_norm: See `clipped_grad`.
        rescale_to_unit_norm: See `clipped_grad`.
        normalize_by: See `clipped_grad`.
        return_norms: Whether to return the norms before clipping.
        microbatch_size: See `clipped_grad`.
        nan_safe: See `clipped_grad`.
        dtype: See `clipped_grad`.
        prng_argnum: See `clipped_grad`.
        spmd_axis_name: See `clipped_grad`.
        grid_scale: See `clipped_grad`.

    Returns:
        A callable that returns the sum, `(sum, aux)`, `(sum, norms)` or `(sum, (aux, norms))`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range, or arguments contradict each other.

    Guarantees:
        As for `clipped_grad`.

    Example:
        >>> clipped_fun(jnp.mean, l2_clip_norm=1.0)(jnp.array([0.5, 3.0])).item()
        1.5
    """
    batch_args = _as_tuple(batch_argnums)
    normalize_by, microbatch_size = _check_sizes(normalize_by, microbatch_size)
    for bound in jax.tree.leaves(l2_clip_norm):
        check_clip_norm(bound)
    if grid_scale is not None:
        _check_grid(grid_scale, l2_clip_norm, rescale_to_unit_norm, normalize_by)
    fun = _with_aux(fun, has_aux)

    def clip(value: PyTree) -> tuple[PyTree, PyTree]:
        value = jax.tree.map(lambda x: _widened(x, dtype), value)
        if grid_scale is not None:
            return clip_and_round_to_grid(value, l2_clip_norm, grid_scale)
        return clip_pytree(value, l2_clip_norm, rescale_to_unit_norm)

    def summed(*args: Any, is_padding_example: jax.Array | None = None) -> Any:
        examples = Examples(args, batch_args, prng_argnum, keep_batch_dim)
        program = jax.make_jaxpr(lambda row: fun(*examples.arguments(row)))
        refuse_mixing(program(examples.row))

        def one_example(row: PyTree, is_padding: jax.Array) -> tuple[PyTree, PyTree]:
            value, aux = fun(*examples.arguments(row))
            clipped, norms = clip(value)
            is_finite = jnp.stack([jnp.isfinite(norm) for norm in jax.tree.leaves(norms)]).all()
            drop = is_padding | ~is_finite if nan_safe else is_padding
            return jax.tree.map(lambda x: jnp.where(drop, 0, x), clipped), (aux, norms)

        value, (aux, norms) = sum_over_examples(
            one_example,
            examples.rows,
            padding_mask(is_padding_example, examples.batch_size),
            microbatch_size=microbatch_size,
            spmd_axis_name=spmd_axis_name,
        )
        value = normalized(value, normalize_by)
        if keep_batch_dim:
            aux = jax.tree.map(_drop_axis_1, aux)
        extras = {(True, False): aux, (False, True): norms, (True, True): (aux, norms)}
        which = (has_aux, return_norms)
        return (value, extras[which]) if which in extras else value

    bound = norm_bound(l2_clip_norm, rescale_to_unit_norm, grid_scale) / normalize_by
    return BoundedSensitivityCallable(summed, bound, has_aux or return_norms)


def _check_sizes(normalize_by: float, microbatch_size: int | None) -> tuple[float, int | None]:
    hint = "It must be a public number, such as the expected batch size."
    normalize_by = _validate.positive("normalize_by", normalize_by, hint)
    if microbatch_size is not None:
        hint = "Pass how many examples fit in memory at once, or None."
        microbatch_size = _validate.integer("microbatch_size", microbatch_size, hint, minimum=1)
    return normalize_by, microbatch_size


def normalized(value: PyTree, normalize_by: float) -> PyTree:
    """Returns a sum over a public number."""
    return value if normalize_by == 1 else jax.tree.map(lambda x: x / normalize_by, value)


def norm_bound(l2_clip_norm: PyTree, rescale_to_unit_norm: bool, grid_scale: float | None) -> Any:
    """Returns the most that the norm of one clipped value can be."""
    bounds = jax.tree.leaves(l2_clip_norm)
    if grid_scale is not None:
        return grid_scale
    if rescale_to_unit_norm:
        return math.sqrt(len(bounds))
    if len(bounds) == 1:
        return bounds[0]
    if any(isinstance(bound, jax.core.Tracer) for bound in bounds):
        return jnp.sqrt(sum(jnp.square(bound) for bound in bounds))
    return math.sqrt(sum(float(bound) ** 2 for bound in bounds))


def _widened(array: jax.Array, dtype: Any) -> jax.Array:
    """Returns an array cast to `dtype`, in float32 or better.

    In half precision the rounding of clipped gradients, and of their sum, would move the sum by
    more than the sensitivity: up to twice as much, for 4096 coordinates of equal size in bfloat16.
    """
    kind = array.dtype if dtype is None else jnp.dtype(dtype)
    if any(jnp.issubdtype(each, jnp.complexfloating) for each in (array.dtype, kind)):
        raise TypeError(
            f"What is clipped must be real, got {array.dtype} as {kind}. Split it into real and "
            "imaginary parts."
        )
    cast = array.astype(kind)
    return cast.astype(widest([cast]))


def padding_mask(is_padding_example: jax.Array | None, batch_size: int) -> jax.Array:
    """Returns the mask, or one without padding; raises ValueError if it has not a bool a row."""
    if is_padding_example is None:
        return jnp.zeros((batch_size,), bool)
    mask = jnp.asarray(is_padding_example)
    if mask.shape != (batch_size,) or mask.dtype != jnp.bool_:
        raise ValueError(
            f"`is_padding_example` must be bools of shape ({batch_size},), got {mask.dtype} of "
            f"shape {mask.shape}. Pass one bool for each row of the batch."
        )
    return mask


def _check_argnums(argnums: int | Sequence[int], batch_argnums: int | Sequence[int]) -> None:
    wanted, batched = _as_tuple(argnums), _as_tuple(batch_argnums)
    if not wanted or not batched or min(wanted + batched) < 0 or set(wanted) & set(batched):
        raise ValueError(
            "`argnums` and `batch_argnums` must be non-empty, non-negative and have nothing in "
            f"common, got {argnums} and {batch_argnums}. Differentiate what has no batch axis."
        )


def _check_grid(
    grid_scale: float, l2_clip_norm: PyTree, rescale_to_unit_norm: bool, normalize_by: float
) -> None:
    hint = "Pass how many integer steps the clip norm spans."
    _validate.positive("grid_scale", grid_scale, hint)
    if rescale_to_unit_norm or normalize_by != 1 or len(jax.tree.leaves(l2_clip_norm)) != 1:
        raise ValueError(
            "`grid_scale` must come with one clip norm and without `rescale_to_unit_norm` or "
            f"`normalize_by`, got {l2_clip_norm}, {rescale_to_unit_norm} and {normalize_by}. "
            "Rescale after the noise."
        )
    if jax.dtypes.canonicalize_dtype(jnp.int64) != jnp.int64:
        raise ValueError(
            "`grid_scale` must be used with 64-bit types, got a process where they are off. "
            'Call jax.config.update("jax_enable_x64", True).'
        )


def _as_tuple(argnums: int | Sequence[int]) -> tuple[int, ...]:
    return (argnums,) if isinstance(argnums, int) else tuple(argnums)


def _with_aux(fun: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    return fun if has_aux else lambda *args: (fun(*args), None)


def _drop_axis_1(array: jax.Array) -> jax.Array:
    return array.squeeze(1) if array.ndim >= 2 and array.shape[1] == 1 else array


def _identity(pytree: PyTree) -> PyTree:
    return pytree
