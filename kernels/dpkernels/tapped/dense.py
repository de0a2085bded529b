"""Products with a weight: `dot_general` in all its layouts."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives

from dpkernels.tapped.graph import Site
from dpkernels.tapped.rows import Rows, per_example, widened
from dpkernels.tapped.views import View, axes_by_stride


@dataclass(frozen=True)
class Dense:
    """A product of data with a weight.

    The weight's axes fall into those shared with the data but not summed over (groups), those
    summed over (left) and those of the output alone (right); the other axes of the data are rows.

    Attributes:
        site: The equation.
        view: Where the weight comes from.
        x_axes: Axes of the data: groups, rows, left.
        w_axes: Axes of the weight: groups, left, right.
        dy_axes: Axes of the output: groups, rows, right.
    """

    site: Site
    view: View
    x_axes: tuple[tuple[int, ...], ...]
    w_axes: tuple[tuple[int, ...], ...]
    dy_axes: tuple[tuple[int, ...], ...]

    @staticmethod
    def match(site: Site, view: View) -> "Dense | None":
        """Returns the use of the weight if this equation is one."""
        if site.eqn is None or site.eqn.primitive is not primitives.dot_general_p:
            return None
        inputs = [var.aval for var in site.eqn.invars]
        if len(site.weights) != 1 or not all(_is_real(aval) for aval in inputs):
            return None
        at = site.weights[0]
        contract, batch = site.eqn.params["dimension_numbers"]
        x, w = inputs[1 - at], inputs[at]
        w_free = tuple(i for i in range(w.ndim) if i not in (*contract[at], *batch[at]))
        right = axes_by_stride(view, w_free)
        pairs = dict(zip(contract[at], contract[1 - at], strict=True))
        left = axes_by_stride(view, contract[at])
        shared = dict(zip(batch[at], batch[1 - at], strict=True))
        groups = axes_by_stride(view, batch[at])
        rows = tuple(i for i in range(x.ndim) if i not in (*contract[1 - at], *batch[1 - at]))
        count = len(batch[at])
        dy_groups = tuple(list(batch[at]).index(axis) for axis in groups)
        first, second = (len(rows), 0) if at == 1 else (0, len(w_free))
        dy_right = tuple(count + first + w_free.index(axis) for axis in right)
        dy_rows = tuple(count + second + i for i in range(len(rows)))
        return Dense(
            site,
            view,
            (tuple(shared[i] for i in groups), rows, tuple(pairs[i] for i in left)),
            (groups, left, right),
            (dy_groups, dy_rows, dy_right),
        )

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Sizes of groups, rows, left and right."""
        x = self.site.eqn.invars[1 - self.site.weights[0]].aval.shape
        w = self.site.eqn.invars[self.site.weights[0]].aval.shape
        groups, left, right = (math.prod(w[i] for i in axes) for axes in self.w_axes)
        rows = math.prod(self.site.loops) * math.prod(x[i] for i in self.x_axes[1])
        return groups, rows, left, right

    def rows(self, saved: list[jax.Array], dy: list[jax.Array]) -> Rows:
        """Returns the gradient as a sum of outer products."""
        return Rows(self._arranged(saved[0], self.x_axes), self._arranged(dy[0], self.dy_axes))

    def grams(self, saved: list[jax.Array], dy: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Returns the Grams of both sides, `(batch, groups, rows, rows)`."""
        return self.rows(saved, dy).grams()

    def product(self, saved: list[jax.Array], dy: list[jax.Array]) -> jax.Array:
        """Returns the gradient of every example, `(batch, *weight)`."""
        rows = self.rows(saved, dy)
        if rows.left.shape[1] == 1:  # One product after the other: they run side by side.
            each = [
                self._contracted(rows.left[i, 0], rows.right[i, 0])
                for i in range(rows.left.shape[0])
            ]
            return self._as_weight(jnp.stack(each), 1)
        total = lax.dot_general(rows.left, rows.right, (((2,), (2,)), ((0, 1), (0, 1))), **_exact)
        return self._as_weight(total, 1)

    def weighted_sum(
        self, saved: list[jax.Array], dy: list[jax.Array], factor: jax.Array
    ) -> jax.Array:
        """Returns the sum of the gradients of all examples, each times its factor."""
        rows = self.rows(saved, dy)
        left, right = rows.left, rows.right
        if left.shape[3] < right.shape[3]:  # The smaller side is the cheaper one to multiply.
            left = left * per_example(factor, left)
        else:
            right = right * per_example(factor, right)
        if left.shape[1] == 1:
            return self._as_weight(self._contracted(left[:, 0], right[:, 0]), 0)
        total = lax.dot_general(left, right, (((0, 2), (0, 2)), ((1,), (1,))), **_exact)
        return self._as_weight(total, 0)

    def _contracted(self, left: jax.Array, right: jax.Array) -> jax.Array:
        """Sums outer products of the last axes over all others.

        On a CPU the larger of the two sizes had better come last: by a third or more for 1024 and
        256. Where they are alike, the order of the weight saves a transposition.
        """
        axes = tuple(range(left.ndim - 1))
        small, large = sorted((left.shape[-1], right.shape[-1]))
        is_swapped = left.shape[-1] > right.shape[-1]
        if large < _ALIKE * small:
            _, left_axes, right_axes = self.w_axes
            is_swapped = min(right_axes, default=0) < min(left_axes, default=0)
        first, second = (right, left) if is_swapped else (left, right)
        total = lax.dot_general(first, second, ((axes, axes), ((), ())), **_exact)
        # XLA would make this and a transposition that follows one product, in the other order.
        total = lax.optimization_barrier(total)
        return total.T if is_swapped else total

    def _arranged(self, array: jax.Array, axes: tuple[tuple[int, ...], ...]) -> jax.Array:
        """Brings `(batch, *loops, ...)` to `(batch, groups, rows, size)`."""
        loops = len(self.site.loops)
        groups, rows, size = ([1 + loops + i for i in part] for part in axes)
        rows = [*range(1, 1 + loops), *rows]
        shape = [math.prod(array.shape[i] for i in part) for part in (groups, rows, size)]
        return widened(array.transpose(0, *groups, *rows, *size).reshape(-1, *shape))

    def _as_weight(self, array: jax.Array, lead: int) -> jax.Array:
        """Brings `(..., groups, left, right)`, groups or not, to the axes of the weight."""
        shape = self.site.eqn.invars[self.site.weights[0]].aval.shape
        order = [axis for part in self.w_axes for axis in part]
        array = array.reshape(*array.shape[:lead], *(shape[axis] for axis in order))
        back = sorted(range(len(order)), key=order.__getitem__)
        return array.transpose(*range(lead), *(lead + i for i in back))


# By how much one size must exceed another for their order to matter more than a transposition.
_ALIKE = 1.5
_exact: dict[str, Any] = {"precision": lax.Precision.HIGHEST}


def _is_real(aval: Any) -> bool:
    return bool(jnp.issubdtype(aval.dtype, jnp.floating))
