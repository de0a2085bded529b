"""One private step, in its halves: forward to the outputs, backward to norms and clipped sums."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.extend.core as jexc
import jax.numpy as jnp
from jax import lax

from dpkernels.tapped import run
from dpkernels.tapped.bags import with_bags
from dpkernels.tapped.blocks import find_blocks
from dpkernels.tapped.cost import choose
from dpkernels.tapped.features_last import features_last
from dpkernels.tapped.forms import Arrays, Form, Values
from dpkernels.tapped.gather import takes_rows
from dpkernels.tapped.graph import Graph, read
from dpkernels.tapped.layout import bind_for
from dpkernels.tapped.once import mark_skips
from dpkernels.tapped.shared import share_gradients
from dpkernels.tapped.views import Views
from dpkernels.tree_clipping import l2_norm, widest


@dataclass(frozen=True)
class Clipping:
    """What is done with norms.

    Attributes:
        groups: For each parameter, which clip norm it is under.
        bounds: The clip norms.
        factor: Returns from norms and a bound what gradients are multiplied by.
        drops_nonfinite: Whether an example with a non-finite gradient contributes zero.
    """

    groups: tuple[int, ...]
    bounds: tuple[Any, ...]
    factor: Callable[[jax.Array, Any], jax.Array]
    drops_nonfinite: bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Residuals:
    """What lies between forward and backward.

    Attributes:
        saved: What each site saved, `(batch, *loops, ...)`.
        pull_back: From cotangents of the outputs to those of the taps.
        constants: Of the graph, which are of the trace that forward was in.
    """

    saved: list[Arrays]
    pull_back: Callable[[Arrays], tuple[list[Any]]]
    constants: dict[int, Any]


class Clipped(NamedTuple):
    """What backward gives.

    Attributes:
        sums: The clipped sums, by parameter.
        norms: `(batch,)` norms before clipping, for each clip norm.
        needs_care: `(batch,)` bools: which norms were taken fast and cannot be relied on. If any,
            sums and norms are not to be used, not even those of the others.
    """

    sums: Arrays
    norms: Arrays
    needs_care: jax.Array


class Plan:
    """The program of one example, taken apart; the form of each block chosen.

    Args:
        closed: The program. Its inputs are the parameters and what belongs to the example; its
            first outputs are what is differentiated: a loss, or several tensors.
        num_trainable: The number of parameters.
        num_differentiated: The number of these outputs.
        batch_size: How many examples there are.
        clip_groups: For each parameter, which clip norm it is under.
        strategy: "auto", "gram" or "product".
        platform: What JAX runs on.

    Attributes:
        graph: The program, read.
        sites: Where parameters meet data.
        forms: How norms and clipped sums are computed.
    """

    def __init__(
        self,
        closed: jexc.ClosedJaxpr,
        num_trainable: int,
        num_differentiated: int,
        batch_size: int,
        clip_groups: Sequence[int],
        strategy: str,
        platform: str,
    ) -> None:
        self.graph: Graph = read(
            features_last(closed) if platform == "cpu" else closed,
            num_trainable=num_trainable,
            num_differentiated=num_differentiated,
            keeps_site=_is_lookup,
        )
        self.graph.top, self._shared = share_gradients(with_bags(self.graph.top))
        if platform == "cpu":
            self.graph.top = mark_skips(self.graph.top)
        self._num_differentiated = num_differentiated
        self.sites = self.graph.top.sites()
        self._platform, self._batch_size = platform, batch_size
        self.forms: list[Form] = [
            choose(block, self.graph, batch_size, platform, strategy)
            for block in find_blocks(self.graph, Views(self.graph, num_trainable), clip_groups)
        ]

    def forward(
        self, params: Arrays, examples: Arrays, spmd_axis_name: str | None = None
    ) -> tuple[Arrays, Residuals]:
        """Runs the program, and keeps what backward needs.

        Args:
            params: The parameters.
            examples: What the program takes beside them, `(batch, ...)`.
            spmd_axis_name: See `jax.vmap`.

        Returns:
            The program's outputs, `(batch, ...)`; and what `backward` takes.
        """
        level, count = self.graph.top, self._num_differentiated
        outer = self.graph.evaluate(params, self.graph.constants)
        bind_local = bind_for(self._platform, self._batch_size)

        def one(taps: list[Any], inputs: Arrays) -> Any:
            outputs, saved = run.evaluate(level, outer, inputs, taps, bind_local)
            return outputs, run.by_site(level, saved)

        def forward(taps: list[Any]) -> Any:
            mapped = jax.vmap(one, spmd_axis_name=spmd_axis_name)
            outputs, saved = mapped(taps, examples)
            return outputs[:count], (outputs[count:], saved)

        size = examples[0].shape[0]
        taps = jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape)), run.zero_taps(level))
        outputs, pull_back, (others, saved) = jax.vjp(forward, taps, has_aux=True)
        return [*outputs, *others], Residuals(saved, pull_back, self.graph.constants)

    def backward(
        self,
        params: Arrays,
        residuals: Residuals,
        cotangents: Arrays,
        is_padding_example: jax.Array,
        clipping: Clipping,
        *,
        is_careful: bool = True,
    ) -> Clipped:
        """Returns clipped sums and norms.

        Args:
            params: The parameters.
            residuals: What `forward` kept.
            cotangents: `(batch, ...)`, of what is differentiated.
            is_padding_example: `(batch,)` bools.
            clipping: How to clip.
            is_careful: Whether norms that cannot be relied on are taken anew, from the gradients
                themselves. That is seldom, and half of what there is to compile.
        """
        (tapped,) = residuals.pull_back(cotangents)
        dy = run.by_site(self.graph.top, tapped)
        for site, other in self._shared.items():
            dy[site] = dy[other]
        values = Values(
            self.graph,
            params,
            self.graph.evaluate(params, residuals.constants),
            residuals.saved,
            dy,
        )
        clipper = _Clipper(self.forms, clipping, is_padding_example)
        return clipper.carefully(values) if is_careful else clipper.fast(values)


@dataclass(frozen=True)
class _Clipper:
    """From gradients at sites to clipped sums."""

    forms: list[Form]
    clipping: Clipping
    is_padding: jax.Array

    def fast(self, values: Values) -> Clipped:
        """Returns what is found fast, and which norms cannot be relied on."""
        kept, norms, is_safe = self._norms(values, is_mended=False)
        # Norms and sums are of one gradient: it is not to be computed for each in its own way.
        kept, saved, dy = lax.optimization_barrier((kept, values.saved, values.dy))
        own = dataclasses.replace(values, saved=saved, dy=dy)
        return Clipped(self._sums(own, kept, self._factors(norms), None), norms, ~is_safe)

    def carefully(self, values: Values) -> Clipped:
        """Returns what can be relied on, whatever the examples hold."""
        kept, norms, is_safe = self._norms(values, is_mended=True)

        def fast(kept: list[Arrays], saved: list[Arrays], dy: list[Arrays]) -> Any:
            own = dataclasses.replace(values, saved=saved, dy=dy)
            return self._sums(own, kept, self._factors(norms), None), norms

        def carefully(kept: list[Arrays], saved: list[Arrays], dy: list[Arrays]) -> Any:
            own = dataclasses.replace(values, saved=saved, dy=dy)
            # A norm depends on its example alone: one that is safe stays as it is.
            chosen = [
                jnp.where(is_safe, norm, careful)
                for norm, careful in zip(norms, self._careful_norms(own, kept), strict=True)
            ]
            keep = ~self.is_padding
            if self.clipping.drops_nonfinite:
                keep &= jnp.stack([jnp.isfinite(norm) for norm in chosen]).all(0)
            factors = [jnp.where(keep, factor, 0) for factor in self._factors(chosen)]
            return self._sums(own, kept, factors, keep), chosen

        operands = kept, values.saved, values.dy
        sums, norms = lax.cond(jnp.all(is_safe), fast, carefully, *operands)
        return Clipped(sums, norms, jnp.zeros(is_safe.shape, bool))

    def _norms(self, values: Values, *, is_mended: bool) -> tuple[list[Arrays], Arrays, jax.Array]:
        """Returns what forms kept, the norms by clip norm, and which can be relied on."""
        kind, bounds = widest(values.params), self.clipping.bounds
        totals = [jnp.zeros(self.is_padding.shape, kind) for _ in bounds]
        is_safe = jnp.ones(self.is_padding.shape, bool)
        kept = []
        for form in self.forms:
            found = form.fast(values, self._limit(form, kind))
            if is_mended:
                found = form.mended(values, found)
            kept.append(found.kept)
            is_safe &= found.is_safe
            for group, squares in zip(self._groups(form), found.squares, strict=True):
                totals[group] = totals[group] + squares.astype(kind)
        for total, bound in zip(totals, bounds, strict=True):
            # Squares this small have lost some of what they are the sum of.
            is_lost = (jnp.asarray(bound, kind) < 1e-9) & (total < 1e-20)
            is_safe &= jnp.isfinite(total) & ~is_lost
        return kept, [jnp.sqrt(total) for total in totals], is_safe

    def _groups(self, form: Form) -> list[int]:
        return [self.clipping.groups[i] for i in form.norm_params]

    def _limit(self, form: Form, kind: Any) -> jax.Array:
        """Returns how large the energy of a row may be.

        Energies below the smallest float are lost: those of rows below 3e-19, say. They matter
        beside rows so large on the other side that the product counts against the clip norm.
        """
        bounds = [jnp.asarray(self.clipping.bounds[i], kind) for i in self._groups(form)]
        return jnp.minimum(1e18, jnp.square(jnp.minimum(jnp.stack(bounds).min(), 1e7) * 1e11))

    def _factors(self, norms: Arrays) -> Arrays:
        return [
            jnp.where(self.is_padding, 0, self.clipping.factor(norm, bound))
            for norm, bound in zip(norms, self.clipping.bounds, strict=True)
        ]

    def _sums(
        self, values: Values, kept: list[Arrays], factors: Arrays, keep: jax.Array | None
    ) -> Arrays:
        sums = [jnp.zeros(param.shape, widest([param])) for param in values.params]
        for form, own in zip(self.forms, kept, strict=True):
            chosen = [factors[group] for group in self._groups(form)]
            for param, total in form.sums(values, own, chosen, keep).items():
                sums[param] = sums[param] + total.astype(sums[param].dtype)
        return sums

    def _careful_norms(self, values: Values, kept: list[Arrays]) -> Arrays:
        """Returns norms of the gradients themselves; squares that overflow are rescaled."""
        parts: list[Arrays] = [[] for _ in self.clipping.bounds]
        kind = widest(values.params)
        for form, own in zip(self.forms, kept, strict=True):
            norms = form.careful_norms(values, own)
            for group, norm in zip(self._groups(form), norms, strict=True):
                parts[group].append(norm.astype(kind))
        zeros = jnp.zeros(self.is_padding.shape, kind)
        return [jax.vmap(l2_norm)(part) if part else zeros for part in parts]


def _is_lookup(eqn: Any, weights: tuple[int, ...]) -> bool:
    return weights == (0,) and takes_rows(eqn)
