"""Optimizers that say how gradients are to be scaled before they are clipped."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from dpkernels import _validate
from dpkernels.tree_clipping import widest

PyTree = Any
# Denominators sqrt(v) + eps are kept in this range, so that both they and their reciprocals are
# finite and positive whatever a second moment has grown or shrunk to.
_SMALLEST, _LARGEST = 2.0**-64, 2.0**64
# No coordinate of a scaled gradient is larger: its norm stays finite, and far above any clip norm.
_BOUND = 2.0**96


@functools.cache
def _readers() -> dict[type, Callable[[Any], PyTree]]:
    """Returns how to find the second moment in the states of optax's optimizers.

    Keyed by type: a user's own parameters may well have a field of the same name.
    """
    # Has no public name. To ask for it starts JAX, which importing this must not.
    corrected_rms = type(optax.scale_by_rms(bias_correction=True).init({}))
    return {
        optax.ScaleByAdamState: lambda state: state.nu,
        optax.ScaleByAmsgradState: lambda state: state.nu_max,
        optax.ScaleByBeliefState: lambda state: state.nu,
        optax.ScaleByRmsState: lambda state: state.nu,
        corrected_rms: lambda state: state.nu,
        optax.ScaleByRssState: lambda state: state.sum_of_squares,
    }


class PreClippingTransform(Protocol):
    """What is done to each gradient before it is clipped, and undone to the noised sum."""

    def __call__(self, updates: PyTree, inverse: bool = False) -> PyTree:
        """Maps a gradient to the space it is clipped in, or a noised sum back from there."""
        ...


class AugmentedGradientTransformation(NamedTuple):
    """An optax gradient transformation with a say in how gradients are clipped.

    Attributes:
        init: As optax has it: `init(params)` returns the state.
        update: As optax has it: `update(updates, state, params=None)`. The updates it is given
            are noised sums in the space of `pre_clipping_transform(state)`, with the same state;
            it takes them back from there itself.
        pre_clipping_transform: `pre_clipping_transform(state)` returns a `PreClippingTransform`
            to give to `clipped_grad`.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[..., tuple[PyTree, PyTree]]
    pre_clipping_transform: Callable[[PyTree], PreClippingTransform]


def as_augmented_optimizer(
    optimizer: optax.GradientTransformation | AugmentedGradientTransformation,
) -> AugmentedGradientTransformation:
    """Returns the optimizer with a `pre_clipping_transform` that changes nothing.

    Args:
        optimizer: An optax gradient transformation. An augmented one is returned as it is.

    Raises:
        TypeError: If `optimizer` has no `init` and `update`.
    """
    if isinstance(optimizer, AugmentedGradientTransformation):
        return optimizer
    _check_optimizer("optimizer", optimizer)
    return AugmentedGradientTransformation(optimizer.init, optimizer.update, lambda _: identity)


def identity(updates: PyTree, inverse: bool = False) -> PyTree:
    """The `PreClippingTransform` that changes nothing."""
    del inverse
    return updates


def scale_then_privatize(
    base_optimizer: optax.GradientTransformation,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    extract_preconditioner_from_state_fn: Callable[[PyTree], PyTree] | None = None,
) -> AugmentedGradientTransformation:
    """Clips and noises gradients in the geometry of an adaptive optimizer.

    With v the second moment that the optimizer held after the step before, each gradient is
    multiplied by s = 1 / (sqrt(v + eps_root) + eps), coordinate by coordinate, then clipped,
    summed and noised. `update` divides by s what came out, and steps the optimizer with it.

    The optimizer may be anything made of optax's: a `chain` with the adaptive part anywhere in
    it, `inject_hyperparams`, `masked`, `partition`, `MultiSteps`. Parameters that no adaptive
    part holds, because they are masked out or belong to a plain one, have s = 1.

    Before the first step v = 0, so that s = 1 / eps everywhere: gradients are clipped to
    eps · `l2_clip_norm` in their own units, and it takes v long to grow from so small a start.
    Choose `eps` near the size of a coordinate of the noised gradient rather than 1e-8.

    Args:
        base_optimizer: Such as `optax.adam`, `adamw`, `amsgrad`, `rmsprop`, `adagrad`,
            `adabelief`, `yogi`, `lamb`.
        eps: Positive, or 0 if `eps_root` is positive.
        eps_root: Non-negative.
        extract_preconditioner_from_state_fn: Returns v from the state of any other optimizer: in
            the structure of the parameters, in shapes that broadcast to theirs. (`optax.adamax`
            keeps a root of v where Adam keeps v: square it.)

    Returns:
        An optimizer whose `pre_clipping_transform(state)` multiplies by s, or with
        `inverse=True` divides by it. What it multiplies comes back in float32 or better, because
        s would overflow half precision.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range; from `init`, if the optimizer has no second moment, or
            several of one parameter.

    Guarantees:
        The transform depends on the optimizer's state alone, a function of noised gradients
        already released: never on the batch.
        A finite gradient stays finite. Where s · g would exceed 2**96 all of it is scaled down to
        that; the clipped gradient is the same, for a clip norm below.

    Source:
        Ganesh, McMahan and Thakurta 2025, "On design principles for private adaptive
        optimizers", arXiv 2507.01129, algorithm 8.

    Example:
        >>> optimizer = scale_then_privatize(optax.rmsprop(0.1, decay=0.0), eps=0.5)
        >>> state = optimizer.init({"w": jnp.zeros(2)})
        >>> optimizer.pre_clipping_transform(state)({"w": jnp.array([1.0, 3.0])})["w"].tolist()
        [2.0, 6.0]
        >>> _, state = optimizer.update({"w": jnp.array([1.0, 3.0])}, state)
        >>> optimizer.pre_clipping_transform(state)({"w": jnp.array([1.0, 3.0])})["w"].tolist()
        [1.0, 1.5]
    """
    if isinstance(base_optimizer, AugmentedGradientTransformation):
        raise TypeError(
            "`base_optimizer` must be an optax gradient transformation, got one that is augmented "
            "already. Wrap the optimizer inside it once."
        )
    _check_optimizer("base_optimizer", base_optimizer)
    hint = "Pass about the size of a coordinate of the noised gradient."
    eps = _validate.non_negative("eps", eps, hint)
    eps_root = _validate.non_negative("eps_root", eps_root, hint)
    if eps == eps_root == 0:
        raise ValueError(f"`eps` must be positive if `eps_root` is 0, got 0. {hint}")

    def denominators(state: PyTree, tree: PyTree) -> list[jax.Array | None]:
        if extract_preconditioner_from_state_fn is None:
            moments = _second_moments(state, tree)
        else:
            moments = _spread(extract_preconditioner_from_state_fn(state), tree)
        return [None if v is None else _denominator(v, eps, eps_root) for v in moments]

    def init(params: PyTree) -> PyTree:
        state = base_optimizer.init(params)
        denominators(state, params)  # Refuses what it cannot scale before the first step.
        return state

    def pre_clipping_transform(state: PyTree) -> PreClippingTransform:
        def transform(updates: PyTree, inverse: bool = False) -> PyTree:
            leaves, structure = jax.tree.flatten(updates)
            apply = _unscaled if inverse else _scaled
            return jax.tree.unflatten(structure, apply(leaves, denominators(state, updates)))

        return transform

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        unscaled = pre_clipping_transform(state)(updates, inverse=True)
        return base_optimizer.update(unscaled, state, params)

    return AugmentedGradientTransformation(init, update, pre_clipping_transform)


def _check_optimizer(name: str, optimizer: Any) -> None:
    if not all(callable(getattr(optimizer, method, None)) for method in ("init", "update")):
        raise TypeError(
            f"`{name}` must be an optax gradient transformation, got {optimizer!r}. "
            "Pass optax.sgd(...), say."
        )


def _second_moments(state: PyTree, tree: PyTree) -> list[jax.Array | None]:
    """Returns v of every leaf of `tree`, or None for a leaf that no adaptive state holds."""
    readers = _readers()
    nodes = jax.tree.leaves_with_path(state, is_leaf=lambda node: type(node) in readers)
    found = [
        (jax.tree_util.keystr(path), _spread(readers[type(node)](node), tree))
        for path, node in nodes
        if type(node) in readers
    ]
    if not any(v is not None for _, held in found for v in held):
        known = ", ".join(kind.__name__ for kind in readers)
        raise ValueError(
            f"`base_optimizer` must keep a second moment, got a state without any of {known}. "
            "Use optax.adam, say, or pass `extract_preconditioner_from_state_fn`."
        )
    moments: list[jax.Array | None] = []
    for index, (path, _) in enumerate(jax.tree.leaves_with_path(tree)):
        held = [(where, v[index]) for where, v in found if v[index] is not None]
        if len(held) > 1:
            raise ValueError(
                f"`base_optimizer` must keep one second moment of a parameter, got {len(held)} of "
                f"{jax.tree_util.keystr(path) or 'the only one'}, in its state at "
                f"{', '.join(where for where, _ in held)}. Pass "
                "`extract_preconditioner_from_state_fn` to choose one."
            )
        moments.append(held[0][1] if held else None)
    return moments


def _spread(moments: PyTree, tree: PyTree) -> list[jax.Array | None]:
    """Returns what `moments` holds for each leaf of `tree`; None where it is masked."""

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    try:
        spread = jax.tree.broadcast(moments, tree, is_leaf=is_masked)
    except ValueError as error:
        raise _mismatch(str(error)) from error
    held = [None if is_masked(v) else v for v in jax.tree.leaves(spread, is_leaf=is_masked)]
    for v, leaf in zip(held, jax.tree.leaves(tree), strict=True):
        if v is not None and not _fits(jnp.shape(v), jnp.shape(leaf)):
            raise _mismatch(f"a second moment of shape {jnp.shape(v)} for one of {jnp.shape(leaf)}")
    return held


def _fits(shape: tuple[int, ...], into: tuple[int, ...]) -> bool:
    padded = (1,) * (len(into) - len(shape)) + tuple(shape)
    return len(padded) == len(into) and all(
        ours in (1, theirs) for ours, theirs in zip(padded, into, strict=True)
    )


def _mismatch(what: str) -> ValueError:
    return ValueError(
        f"The second moment must have the structure and the shapes of the parameters, got {what}. "
        "Pass `extract_preconditioner_from_state_fn` that returns one that has."
    )


def _denominator(v: jax.Array, eps: float, eps_root: float) -> jax.Array:
    v = jnp.asarray(v)
    # Yogi subtracts, and may round to just below 0.
    root = jnp.sqrt(jnp.maximum(v.astype(widest([v])) + eps_root, 0))
    return jnp.clip(root + eps, _SMALLEST, _LARGEST)


def _scaled(leaves: list[jax.Array], denominators: list[jax.Array | None]) -> list[jax.Array]:
    """Divides by the denominators what belongs to one example.

    Quotients are formed twice: once 2**128 times too small, where nothing overflows, to see how
    large they get. Where they get too large all are scaled down alike, which a clipped gradient
    does not show, since that is its direction times the clip norm.
    """
    if not leaves:
        return []
    tiny = [_quotient(leaf, d, 2.0**-64) for leaf, d in zip(leaves, denominators, strict=True)]
    peaks = [jnp.max(jnp.abs(leaf)) for leaf in tiny if leaf.size]
    kind = widest(peaks)
    peak = jnp.stack([peak.astype(kind) for peak in peaks] or [jnp.zeros((), kind)]).max()
    is_large = peak > _BOUND * 2.0**-128
    down = _BOUND / jnp.where(is_large, peak, 1)
    return [
        # The branch not taken may overflow, which a choice between values does not mind.
        jnp.where(is_large, small * down.astype(small.dtype), _quotient(leaf, d, 1.0))
        for small, leaf, d in zip(tiny, leaves, denominators, strict=True)
    ]


def _quotient(leaf: jax.Array, denominator: jax.Array | None, unit: float) -> jax.Array:
    """Returns leaf / denominator · unit², in float32 or better, through factors in range."""
    d = jnp.ones((), jnp.float32) if denominator is None else denominator
    kind = widest([leaf, d])
    return (leaf.astype(kind) * unit) * (unit / d.astype(kind))


def _unscaled(leaves: list[jax.Array], denominators: list[jax.Array | None]) -> list[jax.Array]:
    def unscale(leaf: jax.Array, denominator: jax.Array | None) -> jax.Array:
        if denominator is None:
            return leaf
        kind = widest([leaf, denominator])
        return (leaf.astype(kind) * denominator.astype(kind)).astype(leaf.dtype)

    return [unscale(leaf, d) for leaf, d in zip(leaves, denominators, strict=True)]
