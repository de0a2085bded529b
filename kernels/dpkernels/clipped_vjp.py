"""Clipped sums of gradients where the loss is computed elsewhere, from the outputs of a function.

`clipped_grad` cut in two: forward returns outputs, somebody else differentiates a loss by them, and
backward takes what that gives. No pass is done twice.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from dpkernels import _validate
from dpkernels.clipping import (
    STRATEGIES,
    BoundedSensitivityCallable,
    norm_bound,
    normalized,
    padding_mask,
)
from dpkernels.per_example import Examples
from dpkernels.tapped.gradient import Tapped
from dpkernels.tapped.step import Residuals
from dpkernels.tree_clipping import check_clip_norm

PyTree = Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "residuals"],
    meta_fields=["tapped", "structure"],
)
@dataclass(frozen=True)
class Kept:
    """What forward hands to backward: a pytree, which `jax.jit` can return and take.

    Attributes:
        params: The leaves of the parameters.
        residuals: What depends on the examples.
        tapped: What is to be done.
        structure: Of the outputs.
    """

    params: list[jax.Array]
    residuals: Residuals
    tapped: Tapped = field(repr=False)
    structure: Any


@dataclass(frozen=True)
class ClippedVjp:
    """A function in two halves, see `clipped_vjp`.

    Attributes:
        forward: Takes the function's arguments; returns `(outputs, kept)`, or `(outputs, aux,
            kept)`, of all examples.
        backward: `backward(kept, cotangents)` returns the clipped sum. As bounded, and called, as
            what `clipped_grad` returns.
    """

    forward: Callable[..., Any]
    backward: BoundedSensitivityCallable


def clipped_vjp(
    fun: Callable[..., Any],
    has_aux: bool = False,
    *,
    l2_clip_norm: PyTree,
    rescale_to_unit_norm: bool = False,
    normalize_by: float = 1.0,
    batch_argnums: int | Sequence[int] = 1,
    keep_batch_dim: bool = True,
    nan_safe: bool = True,
    prng_argnum: int | None = None,
    spmd_axis_name: str | None = None,
    strategy: str = "auto",
) -> ClippedVjp:
    """Makes the two halves of a clipped gradient with a loss in between that is computed elsewhere.

    The gradient of an example is that of the inner product of its outputs and their cotangents:
    of any loss that is a sum of one term for each example's outputs.

    Args:
        fun: Returns a pytree of floating-point arrays, or `(outputs, aux)` if `has_aux`, of one
            example. It is differentiated by its first argument.
        has_aux: Whether `fun` returns `(outputs, aux)`.
        l2_clip_norm: As in `clipped_grad`, but not traced.
        rescale_to_unit_norm: As in `clipped_grad`.
        normalize_by: Likewise.
        batch_argnums: Likewise.
        keep_batch_dim: Likewise.
        nan_safe: Likewise.
        prng_argnum: Likewise.
        spmd_axis_name: Likewise.
        strategy: "auto", "gram" or "product", as in `clipped_grad`.

    Raises:
        TypeError: If an argument has the wrong type, or, when called, an output is not of a
            floating type.
        ValueError: If one is out of range.

    Guarantees:
        Those of `clipped_grad`, of the function of outputs' cotangents that `backward` is: the
        cotangents of an example must depend on that example alone.

    Example:
        >>> halves = clipped_vjp(lambda w, x: w * x, l2_clip_norm=1.0)
        >>> w, x = jnp.ones(2), jnp.array([[0.0, 4.0], [0.5, 0.0]])
        >>> outputs, kept = halves.forward(w, x)
        >>> halves.backward(kept, jnp.ones_like(outputs)).tolist()
        [0.5, 1.0]
    """
    _validate.one_of("strategy", strategy, [s for s in STRATEGIES if s != "materialize"])
    for bound in jax.tree.leaves(l2_clip_norm):
        check_clip_norm(bound)
    hint = "Pass a public number, such as the expected batch size."
    normalize_by = _validate.positive("normalize_by", normalize_by, hint)
    batched = (batch_argnums,) if isinstance(batch_argnums, int) else tuple(batch_argnums)

    def forward(*args: Any) -> Any:
        examples = Examples(args, batched, prng_argnum, keep_batch_dim)
        structures = []

        def flat(params: PyTree, row: PyTree) -> tuple[list[jax.Array], PyTree]:
            result = fun(params, *examples.arguments(row)[1:])
            outputs, aux = result if has_aux else (result, None)
            leaves, structure = jax.tree.flatten(outputs)
            structures.append(structure)
            leaves = [jnp.asarray(leaf) for leaf in leaves]
            _check_outputs(leaves)
            return leaves, aux

        params = jax.tree.map(jnp.asarray, args[0])
        tapped = Tapped(
            flat,
            params,
            examples.row,
            batch_size=examples.batch_size,
            l2_clip_norm=l2_clip_norm,
            rescale_to_unit_norm=rescale_to_unit_norm,
            drops_nonfinite=nan_safe,
            strategy=strategy,
        )
        leaves = jax.tree.leaves(params)
        outputs, aux, residuals = tapped.forward(leaves, examples.rows, spmd_axis_name)
        kept = Kept(leaves, residuals, tapped, structures[0])
        tree = jax.tree.unflatten(structures[0], outputs)
        return (tree, aux, kept) if has_aux else (tree, kept)

    def either(
        kept: Kept, cotangents: PyTree, is_padding_example: jax.Array | None, is_careful: bool
    ) -> tuple[PyTree, jax.Array]:
        leaves, structure = jax.tree.flatten(cotangents)
        if structure != kept.structure or not leaves:
            raise ValueError(
                f"`cotangents` must have the structure of the outputs, {kept.structure}, got "
                f"{structure}. Pass one for each output, zeros where the loss ignores it."
            )
        mask = padding_mask(is_padding_example, leaves[0].shape[0])
        sums, _, needs_care = kept.tapped.backward(
            kept.params, kept.residuals, leaves, mask, is_careful=is_careful
        )
        return normalized(sums, normalize_by), jnp.any(needs_care)

    def backward(
        kept: Kept, cotangents: PyTree, *, is_padding_example: jax.Array | None = None
    ) -> PyTree:
        return either(kept, cotangents, is_padding_example, True)[0]

    def fast(
        kept: Kept, cotangents: PyTree, *, is_padding_example: jax.Array | None = None
    ) -> tuple[PyTree, jax.Array]:
        return either(kept, cotangents, is_padding_example, False)

    bound = norm_bound(l2_clip_norm, rescale_to_unit_norm, None) / normalize_by
    return ClippedVjp(forward, BoundedSensitivityCallable(backward, bound, False, fast_fun=fast))


def _check_outputs(leaves: Sequence[jax.Array]) -> None:
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"The outputs of an example must be of a floating type, got {leaf.dtype}. Return "
                "others as `aux`."
            )
