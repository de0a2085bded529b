"""Clipped sums of gradients for a loss of one example: from a function to a plan and its steps."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpkernels.tapped.explain import Explanation, explain, parameter_names
from dpkernels.tapped.step import Clipping, Plan
from dpkernels.tree_clipping import clip_factor

PyTree = Any


class TappedGradient:
    """Clips and sums the gradients of a loss, without forming them where that is dearer.

    Args:
        loss: `loss(params, example)` returns `(loss, aux)` for one example.
        params: What to differentiate by.
        example: Shapes and types of one example.
        batch_size: How many examples there are.
        l2_clip_norm: A number, or a prefix tree of `params`.
        rescale_to_unit_norm: Whether to divide by the clip norm.
        drops_nonfinite: Whether an example with a non-finite gradient contributes zero.
        strategy: "auto", "gram" or "product".

    Raises:
        TypeError: If the loss is not a real scalar, or a parameter is not of a real type.
    """

    def __init__(
        self,
        loss: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]],
        params: PyTree,
        example: PyTree,
        *,
        batch_size: int,
        l2_clip_norm: PyTree,
        rescale_to_unit_norm: bool,
        drops_nonfinite: bool,
        strategy: str,
    ) -> None:
        self._params, self._params_tree = jax.tree.flatten(params)
        self._names, self._batch_size = parameter_names(params), batch_size
        _check_params(self._params)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type), params
        )
        closed, (loss_shape, self._aux) = jax.make_jaxpr(loss, return_shape=True)(shapes, example)
        _check_loss(loss_shape)
        self._clipping = Clipping(
            _groups(l2_clip_norm, params),
            tuple(jax.tree.leaves(l2_clip_norm)),
            lambda norm, bound: clip_factor(norm, bound, rescale_to_unit_norm),
            drops_nonfinite,
        )
        self.plan = Plan(
            closed,
            len(self._params),
            batch_size,
            self._clipping.groups,
            strategy,
            jax.default_backend(),
        )

    def explain(self) -> Explanation:
        """Says what was chosen."""
        plan = self.plan
        return explain(plan.forms, plan.graph, plan.sites, self._names, self._batch_size)

    def __call__(
        self, examples: PyTree, is_padding_example: jax.Array, spmd_axis_name: str | None
    ) -> tuple[PyTree, tuple[jax.Array, PyTree, jax.Array]]:
        """Returns the sums, and `(batch,)` losses, auxiliary outputs and norms of all together."""
        step = self.plan.step(
            self._params,
            jax.tree.leaves(examples),
            is_padding_example,
            self._clipping,
            spmd_axis_name,
        )
        values, *aux = step.outputs
        norm = step.norms[0]
        for other in step.norms[1:]:
            norm = jnp.hypot(norm, other)
        aux_tree = jax.tree.unflatten(jax.tree.structure(self._aux), aux)
        return jax.tree.unflatten(self._params_tree, step.sums), (values, aux_tree, norm)


def _groups(l2_clip_norm: PyTree, params: PyTree) -> tuple[int, ...]:
    """Returns for each parameter the position of its clip norm."""
    leaves, tree = jax.tree.flatten(l2_clip_norm)
    numbered = jax.tree.unflatten(tree, range(len(leaves)))
    spread = jax.tree.map(
        lambda group, subtree: jax.tree.map(lambda _: group, subtree), numbered, params
    )
    return tuple(jax.tree.leaves(spread))


def _check_params(params: Sequence[jax.Array]) -> None:
    for param in params:
        if jnp.issubdtype(param.dtype, jnp.complexfloating):
            raise TypeError(
                f"What is clipped must be real, got {param.dtype}. Split it into real and "
                "imaginary parts."
            )
        if not jnp.issubdtype(param.dtype, jnp.floating):
            raise TypeError(
                f"What is differentiated must be of a floating type, got {param.dtype}. Pass "
                "other arguments outside `argnums`."
            )


def _check_loss(shape: Any) -> None:
    if shape.shape or not jnp.issubdtype(shape.dtype, jnp.floating):
        raise TypeError(
            f"The loss of an example must be a real scalar, got {shape.dtype} of shape "
            f"{shape.shape}. Take its mean or its sum."
        )
