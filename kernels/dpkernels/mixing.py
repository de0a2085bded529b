"""What in a JAX function would see several examples at once, although it is written for one.

JAX's `vmap` turns the program of one example into that of a batch, and nearly every equation keeps
examples apart. A few hand the whole batch to code of their own instead.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental import io_callback
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive

# None raises under vmap by itself.
_ONE_BY_ONE = (None, "sequential", "sequential_unrolled")


def refuse_mixing(closed: ClosedJaxpr, name: str = "fun") -> None:
    """Refuses equations through which one example could reach another.

    Args:
        closed: The program of one example.
        name: What to call it in the error.

    Raises:
        NotImplementedError: If there is one.

    >>> refuse_mixing(jax.make_jaxpr(jnp.tanh)(1.0))
    """
    for equation in _equations(closed.jaxpr):
        reason = _opaque().get(equation.primitive)
        method = equation.params.get("vmap_method")
        if method not in _ONE_BY_ONE:
            reason = f'its `vmap_method` "{method}" shows all examples of a batch to one call'
        if reason is not None:
            raise NotImplementedError(
                f"`{name}` must keep examples apart, got `{equation.primitive.name}`: {reason}. "
                'Write it in jax.numpy, or use jax.pure_callback with vmap_method="sequential".'
            )


def has_custom_derivatives(closed: ClosedJaxpr) -> bool:
    """Whether the gradient of a program may hold what the program itself does not."""
    return any(
        {"jvp_jaxpr_fun", "fwd_jaxpr_thunk"} & equation.params.keys()
        for equation in _equations(closed.jaxpr)
    )


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(list(equation.params.values())):
            yield from _equations(inner)


def _inner(values: Any) -> Iterator[Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _inner(value)


@functools.cache
def _opaque() -> dict[Primitive, str]:
    """Returns the primitives that are not to be had, and why. JAX has no public names for them."""

    @custom_vmap
    def custom(x: jax.Array) -> jax.Array:
        return x

    custom.def_vmap(lambda size, is_batched, x: (x, is_batched[0]))
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return {
        _primitive_of(custom): "its rule for batches may do anything with them",
        _primitive_of(lambda x: io_callback(lambda y: y, scalar, x)): (
            "what it calls may keep data from one example to the next"
        ),
    }


def _primitive_of(function: Callable[[jax.Array], jax.Array]) -> Primitive:
    (equation,) = jax.make_jaxpr(function)(np.float32(0)).eqns
    primitive: Primitive = equation.primitive
    return primitive
