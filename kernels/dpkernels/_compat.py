"""What differs between the supported releases of JAX, in one place."""

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
