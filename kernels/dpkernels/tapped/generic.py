"""Any equation: its own derivative, for one example after the other."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives

from dpkernels._compat import bind
from dpkernels.tapped.graph import Outer, Site, Value
from dpkernels.tapped.rows import widened


@dataclass(frozen=True)
class Generic:
    """An equation that has no rule of its own, or one whose gradient is small: bias, scale.

    Attributes:
        site: The equation.
    """

    site: Site

    def product(
        self, saved: list[jax.Array], dy: list[jax.Array], outer: dict[int, Any]
    ) -> tuple[jax.Array, ...]:
        """Returns the gradient of every example for each weight, `(batch, *weight)`."""

        def one(saved: list[jax.Array], dy: list[jax.Array]) -> tuple[jax.Array, ...]:
            return self._pulled_back(saved, dy, outer, len(self.site.loops))

        return tuple(widened(x) for x in jax.vmap(one)(saved, dy))

    def _pulled_back(
        self, saved: list[jax.Array], dy: list[jax.Array], outer: dict[int, Any], lead: int
    ) -> tuple[jax.Array, ...]:
        """Returns the derivative, summed over `lead` leading axes of what is saved."""
        weights = [outer[ref] for ref in self.site.weight_refs]
        if self.site.eqn is None:
            return (jnp.sum(dy[0], tuple(range(lead))),)

        def evaluate(saved: list[jax.Array], *weights: Any) -> list[jax.Array]:
            found = dict(zip(self.site.saved, saved, strict=True))
            found.update(zip(self.site.weights, weights, strict=True))
            operands = [
                found[i] if i in found else _constant(atom, outer)
                for i, atom in enumerate(self.site.inputs)
            ]
            return bind(self.site.eqn, operands)

        for _ in range(lead):
            evaluate = jax.vmap(evaluate, in_axes=(0, *(None for _ in weights)))
        if self.site.eqn.primitive is primitives.pad_p:
            # JAX cannot transpose a pad by its padding value alone.
            results, by_both = jax.vjp(evaluate, saved, *weights)
            pull_back: Any = lambda cotangents: by_both(cotangents)[1:]  # noqa: E731
        else:
            results, pull_back = jax.vjp(lambda *weights: evaluate(saved, *weights), *weights)
        given = iter(dy)
        cotangents = [
            next(given) if jnp.issubdtype(x.dtype, jnp.inexact) else _no_cotangent(x)
            for x in results
        ]
        return tuple(pull_back(cotangents))


def _constant(atom: Any, outer: dict[int, Any]) -> Any:
    if isinstance(atom, Value):
        return atom.value
    assert isinstance(atom, Outer)
    return outer[atom.index]


def _no_cotangent(array: jax.Array) -> Any:
    return np.zeros(array.shape, jax.dtypes.float0)
