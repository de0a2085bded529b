"""Which examples are drawn: in what order, how often, and the same again after a resumption."""

import zlib
from collections.abc import Iterator

import dp_accounting
import numpy as np

from dpkernels import _validate
from dpkernels.execution_plan import DPExecutionPlan
from dpkernels.training.state import TrainingState


def draw_all(
    plan: DPExecutionPlan, num_examples: int, sampler: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yields the indices of each step, as int64; exactly `plan.iterations` times."""
    count = 0
    for indices in plan.batch_selection_strategy.batch_iterator(num_examples, sampler):
        count += 1
        if count > plan.iterations:
            break
        indices = _checked_indices(np.asarray(indices), num_examples)
        if not isinstance(plan.dp_event, dp_accounting.NonPrivateDpEvent):
            _check_repeats(indices)
        yield indices
    if count != plan.iterations:
        raise RuntimeError(
            f"`plan.batch_selection_strategy` must draw {plan.iterations} batches, as many as the "
            f"plan accounts for, got {count}{' or more' * (count > plan.iterations)}. Do not use "
            "what was trained as private."
        )


def _checked_indices(indices: np.ndarray, num_examples: int) -> np.ndarray:
    if indices.ndim != 1:
        raise NotImplementedError(
            f"Batches must be of examples, got indices of shape {indices.shape}. Batches of users "
            "are not supported here yet; write the loop around plan.clipped_grad."
        )
    # -1 is padding; an empty draw may be of any type.
    is_valid = not indices.size or (
        np.issubdtype(indices.dtype, np.integer)
        and indices.min() >= -1
        and indices.max() < num_examples
    )
    if not is_valid:
        raise RuntimeError(
            "`plan.batch_selection_strategy` must draw integers from -1 (padding) to "
            f"{num_examples - 1}, got {indices}. Check the strategy."
        )
    return indices.astype(np.int64)


def _check_repeats(indices: np.ndarray) -> None:
    unique, counts = np.unique(indices[indices >= 0], return_counts=True)
    if np.any(counts > 1):
        raise RuntimeError(
            "`plan.batch_selection_strategy` must draw an example at most once in a batch, got "
            f"example {unique[counts.argmax()]} {counts.max()} times. Noise hides one clip norm; "
            "draw without replacement."
        )


def checksum(indices: np.ndarray, digest: int) -> int:
    """Returns the checksum of one draw more."""
    # The length too, so that an empty draw counts; 31 bits, so that JAX can hold it as an int32.
    return zlib.crc32(np.append(indices, len(indices)).tobytes(), digest) & 0x7FFFFFFF


def replay(draws: Iterator[np.ndarray], state: TrainingState) -> int:
    """Draws again what a resumed run has drawn before; returns its checksum."""
    digest = 0
    for _ in range(state.step):
        digest = checksum(next(draws), digest)
    if state.draws not in (None, digest):
        raise ValueError(
            "`rng` must draw the same examples as in the run that is resumed, got others in its "
            f"first {state.step} steps. Pass the same seed, plan and dataset; or a generator that "
            "was not used since it was made."
        )
    return digest


def make_generator(rng: int | np.random.Generator | None) -> np.random.Generator:
    """Returns the generator given, or one of a seed, or one of the operating system's bits."""
    if isinstance(rng, np.random.Generator):
        return rng
    if rng is not None:
        hint = "Pass a seed, a numpy.random.Generator, or nothing for the operating system's."
        rng = _validate.integer("rng", rng, hint, minimum=0)
    return np.random.default_rng(rng)


def spawned_seed(generator: np.random.Generator) -> int:
    """Returns 64 bits of a child stream: what the generator itself draws stays as it is."""
    return int(generator.spawn(1)[0].integers(2**64, dtype=np.uint64))
