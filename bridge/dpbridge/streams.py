"""Random streams by name: noise and dropout never share a number, nor do two steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_NOISE, _DROPOUT = 0, 1


class Stream(NamedTuple):
    """A place in one of the streams of a seed; a pytree of plain numbers, so cheap to pass to jit.

    Attributes:
        seed: `(2,)` uint32, the words of a seed below 2**64.
        path: uint32 numbers, folded into the seed one after another.
    """

    seed: np.ndarray
    path: np.ndarray

    def key(self) -> jax.Array:
        """Returns the Threefry key of this place. Call it under jit."""
        key = jax.random.wrap_key_data(jnp.asarray(self.seed), impl="threefry2x32")
        for i in range(self.path.shape[0]):
            key = jax.random.fold_in(key, self.path[i])
        return key


def noise_stream(seed: int) -> Stream:
    """Returns the stream of the privacy noise; its steps are the privatizer's."""
    return _stream(seed, _NOISE)


def dropout_stream(seed: int, step: int, part: int) -> Stream:
    """Returns the stream of dropout in one physical batch of one step."""
    return _stream(seed, _DROPOUT, step, part)


def _stream(seed: int, *path: int) -> Stream:
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    return Stream(words, np.array(path, np.uint32))
