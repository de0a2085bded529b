"""A picture of epsilon against steps."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpbridge.cli.run import Config, relation_name

_POINTS = 25


def check_matplotlib() -> None:
    """Raises ValueError where there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "`plot` must have matplotlib to draw with, got no such package. "
            "Install it: pip install 'dpbridge[examples]'."
        )


def save_chart(path: Path, config: Config, delta: float, accountants: Sequence[str]) -> None:
    """Draws the epsilon that the first steps of a run spend, for each accountant.

    Args:
        path: Where to; its suffix says which format.
        config: Of the run.
        delta: Of all epsilons.
        accountants: Which to ask.

    Raises:
        ValueError: If the epsilon is infinite, so that there is nothing to draw.
        OSError: If the file cannot be written.
    """
    from matplotlib.figure import Figure  # loaded where it is needed: it is not a requirement

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    # Evenly in their root: epsilon grows about as that, and lines between far points would lie.
    roots = np.linspace(1, math.sqrt(config.iterations), _POINTS)
    steps = np.unique((roots**2).round().astype(int)).tolist()
    for accountant in accountants:
        epsilons = [config.epsilon(delta, steps=step, accountant=accountant) for step in steps]
        if not all(map(math.isfinite, epsilons)):
            raise ValueError(
                f"`noise_multiplier` must give a finite epsilon to be drawn, got "
                f"{config.noise_multiplier}, with which it is infinite. Use more noise."
            )
        axes.plot(steps, epsilons, label=accountant, marker=".")
    axes.set_xlabel("step")
    axes.set_ylabel(f"epsilon at delta = {delta:g}")
    axes.set_xlim(0, None)
    axes.set_ylim(0, None)
    relation = relation_name(config.relation)
    axes.set_title(f"noise multiplier {config.noise_multiplier:.6g}, neighbours: {relation}")
    axes.legend(title="accountant", loc="lower right")
    figure.savefig(path, dpi=150)
