"""Clipped sums of gradients for a loss of one example: from a function to a plan and its steps."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpkernels.mixing import has_custom_derivatives, refuse_mixing
from dpkernels.tapped.explain import Explanation, explain, parameter_names
from dpkernels.tapped.step import Clipping, Plan, Residuals
from dpkernels.tree_clipping import clip_factor

PyTree = Any


class Tapped:
    """A function of parameters and one example, taken apart.

    Args:
        function: `function(params, example)` returns `(outputs, aux)`: what is differentiated,
            a list of arrays, and what is not.
        params: What to differentiate by.
        example: Shapes and types of one example.
        batch_size: How many examples there are.
        l2_clip_norm: A number, or a prefix tree of `params`.
        rescale_to_unit_norm: Whether to divide by the clip norm.
        drops_nonfinite: Whether an example with a non-finite gradient contributes zero.
        strategy: "auto", "gram" or "product".

    Attributes:
        plan: What is done.
        outputs: Shapes and types of what is differentiated.

    Raises:
        TypeError: If a parameter is not of a real type.
    """

    def __init__(
        self,
        function: Callable[[PyTree, PyTree], tuple[list[jax.Array], PyTree]],
        params: PyTree,
        example: PyTree,
        *,
        batch_size: int,
        l2_clip_norm: PyTree,
        rescale_to_unit_norm: bool,
        drops_nonfinite: bool,
        strategy: str,
    ) -> None:
        leaves, self._params_tree = jax.tree.flatten(params)
        self._names, self._batch_size = parameter_names(params), batch_size
        _check_params(leaves)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type), params
        )
        closed, (self.outputs, aux) = jax.make_jaxpr(function, return_shape=True)(shapes, example)
        refuse_mixing(closed)
        if has_custom_derivatives(closed):
            refuse_mixing(jax.make_jaxpr(_pulled_back(function))(shapes, example))
        self._aux_tree = jax.tree.structure(aux)
        self._clipping = Clipping(
            _groups(l2_clip_norm, params),
            tuple(jax.tree.leaves(l2_clip_norm)),
            lambda norm, bound: clip_factor(norm, bound, rescale_to_unit_norm),
            drops_nonfinite,
        )
        self.plan = Plan(
            closed,
            len(leaves),
            len(self.outputs),
            batch_size,
            self._clipping.groups,
            strategy,
            jax.default_backend(),
        )

    def explain(self) -> Explanation:
        """Says what was chosen."""
        plan = self.plan
        return explain(plan.forms, plan.graph, plan.sites, self._names, self._batch_size)

    def forward(
        self, params: Sequence[jax.Array], examples: PyTree, spmd_axis_name: str | None = None
    ) -> tuple[list[jax.Array], PyTree, Residuals]:
        """Returns what is differentiated and what is not, `(batch, ...)`, and the residuals.

        Args:
            params: The leaves of the parameters.
            examples: `(batch, ...)`.
            spmd_axis_name: See `jax.vmap`.
        """
        rows, count = jax.tree.leaves(examples), len(self.outputs)
        outputs, residuals = self.plan.forward(list(params), rows, spmd_axis_name)
        return outputs[:count], jax.tree.unflatten(self._aux_tree, outputs[count:]), residuals

    def backward(
        self,
        params: Sequence[jax.Array],
        residuals: Residuals,
        cotangents: list[jax.Array],
        is_padding_example: jax.Array,
        *,
        is_careful: bool = True,
    ) -> tuple[PyTree, jax.Array, jax.Array]:
        """Returns the clipped sums, `(batch,)` norms of all together, and what needs care.

        Args:
            params: The leaves that `forward` had.
            residuals: What it returned.
            cotangents: Of what is differentiated, `(batch, ...)`.
            is_padding_example: `(batch,)` bools.
            is_careful: See `Plan.backward`; without it nothing may need care, see `Clipped`.
        """
        sums, norms, needs_care = self.plan.backward(
            list(params),
            residuals,
            cotangents,
            is_padding_example,
            self._clipping,
            is_careful=is_careful,
        )
        norm = norms[0]
        for other in norms[1:]:
            norm = jnp.hypot(norm, other)
        return jax.tree.unflatten(self._params_tree, sums), norm, needs_care


class TappedGradient(Tapped):
    """Clips and sums the gradients of a loss, without forming them where that is dearer.

    Args:
        loss: `loss(params, example)` returns `(loss, aux)` for one example.
        params: See `Tapped`.
        example: Likewise.
        **options: Likewise.

    Raises:
        TypeError: If the loss is not a real scalar, or a parameter is not of a real type.
    """

    def __init__(
        self,
        loss: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]],
        params: PyTree,
        example: PyTree,
        **options: Any,
    ) -> None:
        def function(params: PyTree, example: PyTree) -> tuple[list[jax.Array], PyTree]:
            value, aux = loss(params, example)
            value = jnp.asarray(value)
            _check_loss(value)
            return [value], aux

        super().__init__(function, params, example, **options)

    def __call__(
        self,
        params: PyTree,
        examples: PyTree,
        is_padding_example: jax.Array,
        spmd_axis_name: str | None,
        *,
        is_careful: bool = True,
    ) -> tuple[PyTree, tuple[jax.Array, PyTree, jax.Array, jax.Array]]:
        """Returns the sums, and `(batch,)` losses, auxiliary outputs, norms and what needs care."""
        leaves = jax.tree.leaves(params)
        (values,), aux, residuals = self.forward(leaves, examples, spmd_axis_name)
        ones = [jnp.ones_like(values)]
        sums, norms, needs_care = self.backward(
            leaves, residuals, ones, is_padding_example, is_careful=is_careful
        )
        return sums, (values, aux, norms, needs_care)


def _pulled_back(
    function: Callable[[PyTree, PyTree], tuple[list[jax.Array], PyTree]],
) -> Callable[[PyTree, PyTree], PyTree]:
    """Returns the function with its backward pass."""

    def both(params: PyTree, example: PyTree) -> PyTree:
        outputs, pull_back, _ = jax.vjp(lambda p: function(p, example), params, has_aux=True)
        return pull_back([jnp.ones_like(x) for x in outputs])

    return both


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
