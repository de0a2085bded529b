"""Canaries: examples that leave a trace, to be put into a dataset or left out by a coin.

Example:
    >>> import numpy as np
    >>> x, y = np.zeros((100, 3)), np.arange(100) % 10
    >>> canaries = mislabelled_canaries((x, y), 20, num_classes=10, rng=0)
    >>> inserted = insert_canaries((x, y), canaries, rng=1)
    >>> len(inserted.dataset[0]) - 100 == inserted.is_included.tolist().count(True)
    True
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from dpkernels import _validate

PyTree = Any
_COUNT_HINT = "Pass the number of canaries; 1000 is usual for an audit in one run."


class InsertedCanaries(NamedTuple):
    """A dataset with canaries in it.

    Attributes:
        dataset: A pytree of `(examples, ...)` arrays, the included canaries last.
        is_included: `(canaries,)` bools.
    """

    dataset: PyTree
    is_included: np.ndarray


def insert_canaries(
    dataset: PyTree, canaries: PyTree, *, rng: np.random.Generator | int | None = None
) -> InsertedCanaries:
    """Puts each canary into a dataset if a fair coin of its own says so.

    Args:
        dataset: A pytree of `(examples, ...)` arrays.
        canaries: A pytree of the same structure of `(canaries, ...)` arrays.
        rng: The coins. By default from the operating system.

    Raises:
        ValueError: If the two differ in structure, shapes or types, or leaves in their length.

    Guarantees:
        Each canary is included with probability one half, independently of all others and of
        what it holds: what `CanaryScoreAuditor.epsilon_one_run` rests on.

    Source:
        Steinke, Nasr and Jagielski 2023, arXiv 2305.08846, algorithm 1.
    """
    _length("dataset", dataset)
    num_canaries = _length("canaries", canaries)
    _check_alike(dataset, canaries)
    is_included = np.random.default_rng(rng).random(num_canaries) < 0.5
    combined = jax.tree.map(
        lambda rows, more: np.concatenate([rows, np.asarray(more)[is_included]]), dataset, canaries
    )
    return InsertedCanaries(combined, is_included)


def mislabelled_canaries(
    dataset: tuple[PyTree, npt.ArrayLike],
    num_canaries: int,
    *,
    num_classes: int,
    rng: np.random.Generator | int | None = None,
) -> tuple[PyTree, np.ndarray]:
    """Returns copies of examples, each under a wrong label drawn uniformly.

    Score such a canary by how well the model knows it: minus its loss under the wrong label. Take
    the examples that are copied out of the training data, or hold them back for this.

    Args:
        dataset: Inputs, a pytree of `(examples, ...)` arrays, and labels, `(examples,)` whole
            numbers in [0, num_classes).
        num_canaries: How many, at most as many as there are examples: none is copied twice.
        num_classes: How many classes there are, at least 2.
        rng: The choice of examples and labels. By default from the operating system.

    Raises:
        TypeError: If labels are not integers.
        ValueError: If a number is out of range.

    Source:
        Steinke et al. 2023, section 6; Nasr et al. 2021, arXiv 2101.04535.
    """
    inputs, labels = dataset[0], np.asarray(dataset[1])
    num_classes = _validate.integer("num_classes", num_classes, "Two at least.", minimum=2)
    num_canaries = _validate.integer("num_canaries", num_canaries, _COUNT_HINT, minimum=1)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"`labels` must be integers, got {labels.dtype}. Pass class indices.")
    size = _length("dataset", (inputs, labels))
    if num_canaries > size or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"`num_canaries` must be at most {size} and labels in [0, {num_classes}), got "
            f"{num_canaries}, and labels {labels.min()} to {labels.max()}. Pass fewer canaries, "
            "or the right `num_classes`."
        )
    generator = np.random.default_rng(rng)
    chosen = generator.choice(size, num_canaries, replace=False)
    offsets = generator.integers(1, num_classes, size=num_canaries)
    wrong = ((labels[chosen] + offsets) % num_classes).astype(labels.dtype)
    return jax.tree.map(lambda rows: np.asarray(rows)[chosen], inputs), wrong


@dataclass(frozen=True, eq=False)
class GradientCanaries:
    """Canaries whose gradient is a large multiple of one coordinate direction each.

    Directions are orthogonal, so that canaries do not disturb one another, and the gradient is
    larger than any clip norm, so that each moves the clipped sum as far as an example may.

    An example becomes a pair `(example, canary)`, where `canary` is -1 for an ordinary example
    and k for the k-th canary, whose own `example` is then not looked at.

    Attributes:
        coordinates: `(canaries,)`, each canary's coordinate in the flattened parameters.
        gradient_norm: The norm of a canary's gradient before clipping.

    Source:
        Nasr et al. 2023, arXiv 2302.07956, section 4; Steinke et al. 2023, section 6.

    Example:
        >>> params = {"w": jnp.zeros((2, 2))}
        >>> canaries = GradientCanaries.draw(params, 3, rng=0)
        >>> loss = canaries.wrap_loss(lambda params, x: jnp.sum(params["w"] @ x))
        >>> gradient = jax.grad(loss)(params, (jnp.ones(2), jnp.int32(1)))["w"]
        >>> np.flatnonzero(gradient).tolist() == canaries.coordinates[1:2].tolist()
        True
    """

    coordinates: np.ndarray
    gradient_norm: float = 1e6

    @classmethod
    def draw(
        cls,
        params: PyTree,
        num_canaries: int,
        *,
        gradient_norm: float = 1e6,
        rng: np.random.Generator | int | None = None,
    ) -> "GradientCanaries":
        """Returns canaries at coordinates drawn without replacement.

        Args:
            params: The parameters, a pytree of arrays.
            num_canaries: How many, at most the number of coordinates.
            gradient_norm: Any number far above the clip norm.
            rng: The choice of coordinates. By default from the operating system.

        Raises:
            ValueError: If there are more canaries than coordinates, or a number is out of range.
        """
        size = sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))
        num_canaries = _validate.integer("num_canaries", num_canaries, _COUNT_HINT, minimum=1)
        hint = "Pass a number far above the clip norm."
        gradient_norm = _validate.positive("gradient_norm", gradient_norm, hint)
        if num_canaries > size:
            raise ValueError(
                f"`num_canaries` must be at most the {size} coordinates of the parameters, got "
                f"{num_canaries}. Orthogonal canaries need one each."
            )
        drawn = np.random.default_rng(rng).choice(size, num_canaries, replace=False)
        return cls(drawn, gradient_norm)

    @property
    def labels(self) -> np.ndarray:
        """The second halves of the canaries' pairs: 0, 1, ..., as int32."""
        return np.arange(self.coordinates.size, dtype=np.int32)

    def wrap_loss(self, loss_fn: Callable[[PyTree, PyTree], jax.Array]) -> Callable[..., jax.Array]:
        """Returns the loss of `(params, (example, canary))` for one example.

        Args:
            loss_fn: The loss of `(params, example)` for one example.
        """
        coordinates = jnp.asarray(self.coordinates, jnp.int32)

        def loss(params: PyTree, pair: tuple[PyTree, jax.Array]) -> jax.Array:
            example, canary = pair
            label = jnp.reshape(canary, ())
            coordinate = coordinates[jnp.maximum(label, 0)]
            ordinary = loss_fn(params, example)
            trace = jnp.asarray(self.gradient_norm, ordinary.dtype)
            trace = trace * _coordinate_of(params, coordinate).astype(ordinary.dtype)
            return jnp.where(label < 0, ordinary, trace)

        return loss

    def scores(self, gradients: PyTree) -> np.ndarray:
        """Returns each canary's score: how far the released gradients went its way.

        Args:
            gradients: The sum of all noised gradients, a pytree like the parameters. Minus the
                change of the parameters serves as well, for plain gradient descent.
        """
        leaves = [np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(gradients)]
        return np.concatenate(leaves).astype(np.float64)[self.coordinates]


def _coordinate_of(params: PyTree, coordinate: jax.Array) -> jax.Array:
    """Returns one coordinate of the flattened parameters, without flattening them together."""
    total = jnp.zeros(())
    start = 0
    for leaf in jax.tree.leaves(params):
        inside = (coordinate >= start) & (coordinate < start + leaf.size)
        value = jnp.ravel(leaf)[jnp.clip(coordinate - start, 0, max(leaf.size - 1, 0))]
        total = total + jnp.where(inside, value.astype(total.dtype), 0)
        start += leaf.size
    return total


def _length(name: str, tree: PyTree) -> int:
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            f"`{name}` must be arrays with one length, got {sorted(lengths)}. The first axis of "
            "each is that of the examples."
        )
    ((length,),) = lengths
    return length


def _check_alike(dataset: PyTree, canaries: PyTree) -> None:
    def describe(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: (np.shape(x)[1:], str(np.asarray(x).dtype)), tree)

    if describe(dataset) != describe(canaries):
        raise ValueError(
            f"`canaries` must be like the dataset, {describe(dataset)}, got {describe(canaries)}. "
            "Convert them; otherwise the arrays of the dataset would change."
        )
