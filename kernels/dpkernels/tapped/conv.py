"""Convolutions of any rank, stride, dilation and number of groups, transposed ones included.

A convolution is a product with patches of its input. What XLA makes of the gradient with respect to
the kernel is slow on a CPU, for one example and for many, so it is spelled here: patches of a few
examples at a time, which stay in the cache, and one product for each.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives

from dpkernels.tapped.chunks import sum_examples
from dpkernels.tapped.graph import Site
from dpkernels.tapped.layout import windows
from dpkernels.tapped.rows import per_example, products, widened
from dpkernels.tapped.views import View

_CACHE = 4 * 2**20  # Bytes of patches that are worked on at once.
_DEEP = 8


@dataclass(frozen=True)
class Conv:
    """A convolution of data with a kernel.

    Attributes:
        site: The equation.
        view: Where the kernel comes from.
    """

    site: Site
    view: View

    @staticmethod
    def match(site: Site, view: View) -> "Conv | None":
        """Returns the use of the kernel if this equation is one."""
        if site.eqn is None or site.eqn.primitive is not primitives.conv_general_dilated_p:
            return None
        is_real = all(jnp.issubdtype(var.aval.dtype, jnp.floating) for var in site.eqn.invars)
        if site.weights != (1,) or not is_real or site.eqn.params["batch_group_count"] != 1:
            return None
        return Conv(site, view)

    @cached_property
    def _specs(self) -> Any:
        return self.site.eqn.params["dimension_numbers"]

    @cached_property
    def groups(self) -> int:
        """Number of groups of features."""
        return int(self.site.eqn.params["feature_group_count"])

    @cached_property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the kernel's spatial axes."""
        shape = self.site.eqn.invars[1].aval.shape
        return tuple(shape[i] for i in self._specs.rhs_spec[2:])

    @cached_property
    def out(self) -> tuple[int, ...]:
        """Sizes of the output's spatial axes."""
        shape = self.site.avals[0].shape
        return tuple(shape[i] for i in self._specs.out_spec[2:])

    @cached_property
    def pixels(self) -> int:
        """Number of places of the input."""
        shape = self.site.eqn.invars[0].aval.shape
        return math.prod(shape[i] for i in self._specs.lhs_spec[2:])

    @cached_property
    def images(self) -> int:
        """Number of inputs that one example brings."""
        batch = self.site.eqn.invars[0].aval.shape[self._specs.lhs_spec[0]]
        return int(math.prod(self.site.loops) * batch)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Sizes of groups, rows, left (a patch) and right (output features of a group)."""
        shape = self.site.eqn.invars[1].aval.shape
        out_features, in_features = (shape[i] for i in self._specs.rhs_spec[:2])
        left = in_features * math.prod(self.kernel)
        return self.groups, self.images * math.prod(self.out), left, out_features // self.groups

    def grams(self, saved: list[jax.Array], dy: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Returns the Grams of patches and of output gradients, `(batch, groups, rows, rows)`.

        Patches overlap, so their inner products are sums over the kernel of inner products of
        pixels, each of which is taken once.
        """
        outputs = self._outputs(dy[0])  # (batch, images, *out, groups, features)
        right = outputs.reshape(outputs.shape[0], -1, *outputs.shape[-2:]).transpose(0, 2, 1, 3)
        if self.images == 1 and self.pixels <= self.sizes[1] * 2:
            return self._overlapping(self._inputs(saved[0])), products(right, right)
        left = self._patches(self._inputs(saved[0]))
        left = left.reshape(left.shape[0], -1, *left.shape[-2:]).transpose(0, 2, 1, 3)
        return products(left, left), products(right, right)

    def product(self, saved: list[jax.Array], dy: list[jax.Array]) -> jax.Array:
        """Returns the gradient of every example, `(batch, *kernel)`."""
        return self.as_weight(self.raw_product(saved, dy), 1)

    def raw_product(self, saved: list[jax.Array], dy: list[jax.Array]) -> jax.Array:
        """Returns the same as it comes out: with one example's numbers in some other order."""
        inputs, outputs = self._inputs(saved[0]), self._outputs(dy[0])
        each = [
            self._contracted(self._patches(inputs[i : i + 1]), outputs[i : i + 1])
            for i in range(inputs.shape[0])
        ]
        return jnp.stack(each)

    def weighted_sum(
        self, saved: list[jax.Array], dy: list[jax.Array], factor: jax.Array
    ) -> jax.Array:
        """Returns the sum of the gradients of all examples, each times its factor."""

        def part(rows: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            x, dy, factor = rows
            outputs = self._outputs(widened(dy) * per_example(factor, dy))
            return self._contracted(self._patches(self._inputs(x)), outputs)

        total = sum_examples(part, (saved[0], dy[0], factor), self.at_once)
        return self.as_weight(total, 0)

    @property
    def at_once(self) -> int:
        """How many examples' patches fit into the cache."""
        groups, rows, left, right = self.sizes
        # Adding often to a large sum costs more than what the cache saves.
        most = max(_CACHE, 8 * groups * left * right)
        return max(1, most // max(1, 4 * groups * rows * left))

    def _inputs(self, x: jax.Array) -> jax.Array:
        """Brings `(batch, *loops, ...)` to `(batch, images, *spatial, features)`, padded."""
        params = self.site.eqn.params
        x = widened(_images_last(x, self._specs.lhs_spec, len(self.site.loops)))
        padding = [
            (low, high, inner - 1)
            for (low, high), inner in zip(params["padding"], params["lhs_dilation"], strict=True)
        ]
        if all(widths == (0, 0, 0) for widths in padding):
            return x
        none = [(0, 0, 0)]
        return lax.pad(x, jnp.zeros((), x.dtype), none * 2 + padding + none)

    def _outputs(self, dy: jax.Array) -> jax.Array:
        """Brings `(batch, *loops, ...)` to `(batch, images, *out, groups, features)`."""
        dy = widened(_images_last(dy, self._specs.out_spec, len(self.site.loops)))
        return dy.reshape(*dy.shape[:-1], self.groups, -1)

    def _patches(self, inputs: jax.Array) -> jax.Array:
        """Returns `(batch, images, *out, groups, kernel * features)`."""
        params, rank = self.site.eqn.params, len(self.kernel)
        lead, features = inputs.shape[:2], inputs.shape[-1] // self.groups
        strides, steps = params["window_strides"], params["rhs_dilation"]
        if tuple(strides) == self.kernel and set(steps) == {1}:
            ends = [size * step for size, step in zip(self.out, strides, strict=True)]
            inputs = inputs[(..., *(slice(end) for end in ends), slice(None))]
            pairs = [size for pair in zip(self.out, self.kernel, strict=True) for size in pair]
            split = inputs.reshape(*lead, *pairs, self.groups, features)
            out, kernel = range(2, 2 + 2 * rank, 2), range(3, 3 + 2 * rank, 2)
            ordered = split.transpose(0, 1, *out, 2 + 2 * rank, *kernel, 3 + 2 * rank)
            return ordered.reshape(*lead, *self.out, self.groups, -1)
        parts = [inputs[(slice(None), slice(None), *window)] for window in self._windows()]
        parts = [part.reshape(*part.shape[:-1], self.groups, features) for part in parts]
        if self._is_deep:
            return jnp.stack(parts, -1).reshape(*parts[0].shape[:-1], -1)
        return jnp.concatenate(parts, -1)

    def _windows(self) -> Iterator[tuple[slice, ...]]:
        params = self.site.eqn.params
        return windows(self.kernel, params["window_strides"], params["rhs_dilation"], self.out)

    def _overlapping(self, inputs: jax.Array) -> jax.Array:
        """Returns the Gram of the patches of one image, `(batch, groups, rows, rows)`."""
        batch, space = inputs.shape[0], inputs.shape[2:-1]
        flat = inputs.reshape(batch, -1, self.groups, inputs.shape[-1] // self.groups)
        flat = flat.transpose(0, 2, 1, 3)
        gram = products(flat, flat).reshape(batch, self.groups, *space, *space)
        total: Any = 0
        for window in self._windows():
            total = total + gram[(slice(None), slice(None), *window, *window)]
        rows = math.prod(self.out)
        return total.reshape(batch, self.groups, rows, rows)

    @property
    def _is_deep(self) -> bool:
        """Whether there are many more output features than places.

        Then patches are small beside the kernel, and brought into its order: features first.
        """
        _, rows, _, right = self.sizes
        return right >= _DEEP * rows

    @property
    def _is_wide(self) -> bool:
        """Whether a patch has more numbers than the output features.

        On a CPU the larger of the two had better come last: 97 against 58 GFLOP/s for 576 and 64.
        """
        _, _, left, right = self.sizes
        return self.groups == 1 and left > right

    def _contracted(self, patches: jax.Array, outputs: jax.Array) -> jax.Array:
        """Sums over examples, images and places: `(groups, kernel * features, features)`.

        The last two are the other way round where patches are wide.
        """
        left, right = (x.reshape(-1, *x.shape[-2:]) for x in (patches, outputs))
        exact = lax.Precision.HIGHEST
        if self.groups == 1:
            pair = (right[:, 0], left[:, 0]) if self._is_wide else (left[:, 0], right[:, 0])
            return lax.dot_general(*pair, (((0,), (0,)), ((), ())), precision=exact)[None]
        return lax.dot_general(left, right, (((0,), (0,)), ((1,), (1,))), precision=exact)

    def as_weight(self, array: jax.Array, lead: int) -> jax.Array:
        """Brings what `_contracted` returns, behind `lead` axes, to the axes of the kernel."""
        rank, (groups, _, left, right) = len(self.kernel), self.sizes
        features = left // math.prod(self.kernel)
        patch = (features, *self.kernel) if self._is_deep else (*self.kernel, features)
        shape = (right, *patch) if self._is_wide else (*patch, right)
        array = array.reshape(*array.shape[:lead], groups, *shape)
        first = lead + (2 if self._is_wide else 1)  # Of a patch's axes.
        at = list(range(first, first + rank + 1))
        at = at if self._is_deep else [at[-1], *at[:-1]]
        array = array.transpose(*range(lead + 1), lead + 1 if self._is_wide else -1, *at)
        array = array.reshape(*array.shape[:lead], -1, *array.shape[lead + 2 :])
        back = [self._specs.rhs_spec.index(i) for i in range(rank + 2)]
        return array.transpose(*range(lead), *(lead + i for i in back))


def _images_last(array: jax.Array, spec: tuple[int, ...], loops: int) -> jax.Array:
    """Brings `(batch, *loops, ...)` to `(batch, images, *spatial, features)`."""
    first = 1 + loops
    order = [spec[0], *spec[2:], spec[1]]
    array = array.transpose(*range(first), *(first + i for i in order))
    return array.reshape(array.shape[0], -1, *array.shape[first + 1 :])
