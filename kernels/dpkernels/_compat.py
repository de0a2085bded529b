"""What differs between the supported releases of JAX, in one place."""

from collections.abc import Sequence
from typing import Any

import jax.extend.core as jexc
import jaxlib.version


def refuse_broken_jaxlib(version: str = jaxlib.version.__version__) -> None:
    """Raises ImportError for a jaxlib whose CPU compiler gets per-example gradients wrong.

    The requirements exclude it, but an environment can be put together in spite of them. Under
    0.10.2 a matrix-vector product followed by a sum of squares, which is a per-example norm, is
    wrong by 10 to 30 per cent for every example but the first (jax-ml/jax#39103): a clip norm that
    does not hold.
    """
    if version == "0.10.2":
        raise ImportError(
            "jaxlib must not be 0.10.2, which computes wrong per-example gradients on the CPU, got "
            f"{version}. Install another release, such as jax==0.10.1."
        )


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Evaluates an equation of a jaxpr; custom derivative rules survive."""
    params = eqn.primitive.get_bind_params(eqn.params)
    # Before jax 0.9.2: functions to be called, and parameters.
    functions, params = params if isinstance(params, tuple) else ((), params)
    results = eqn.primitive.bind(*functions, *operands, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def inner_jaxpr(eqn: Any) -> jexc.ClosedJaxpr:
    """Returns the program inside a call or a loop."""
    inner = eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]
    # `remat` holds a jaxpr without its constants, because it has none.
    return inner if isinstance(inner, jexc.ClosedJaxpr) else jexc.ClosedJaxpr(inner, ())


def scan_counts(eqn: Any) -> tuple[int, int, int]:
    """Returns how many operands of a scan are constants, its carry, and taken turn by turn."""
    if "num_consts" in eqn.params:
        num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
    else:  # From jax 0.11 on.
        num_consts, num_carry = map(len, eqn.params["ft_in"].unpack()[:2])
    return num_consts, num_carry, len(eqn.invars) - num_consts - num_carry
