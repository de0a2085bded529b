"""The least noise, or the largest run, that fits a budget."""

import argparse
import dataclasses
import math
from typing import Any

from dpbridge.cli.options import run_of
from dpbridge.cli.report import Report, rounded_up
from dpbridge.cli.run import Config, Run
from dpbridge.cli.statement import state
from dpkernels import _validate
from dpkernels.composition import largest_count

_WORDS = {
    "noise_multiplier": "noise multiplier",
    "iterations": "number of steps",
    "batch_size": "batch size",
}


def calibrate(args: argparse.Namespace) -> Report:
    """Answers `dpbridge calibrate`."""
    run = run_of(args)
    name = _unknown(run)
    _validate.positive("epsilon", args.epsilon, "0.1 to 10 is usual.")
    _validate.open_unit("delta", args.delta, "Choose it well below one over the dataset's size.")
    find = _least_noise if name == "noise_multiplier" else _largest
    value = find(run, name, args)
    config = _with(run, name, value).config()
    report = state(args, config, [config.check_accountant(args.accountant)])
    found = {"found": {name: value}, "epsilon_target": args.epsilon}
    rows = [("found", f"{_WORDS[name]} {value}"), ("for an epsilon of", str(args.epsilon))]
    return Report(report.values | found, rows + report.rows)


def _unknown(run: Run) -> str:
    """Returns the name of what is to be found."""
    is_given = {
        "noise_multiplier": run.noise_multiplier is not None,
        "iterations": run.iterations is not None,
        "batch_size": run.has_batches,
    }
    unknown = [name for name, given in is_given.items() if not given]
    if len(unknown) != 1:
        left_out = " and ".join(f"`{name}`" for name in unknown) or "none"
        raise ValueError(
            "Exactly one of `noise_multiplier`, `iterations` and `batch_size` (or what stands for "
            f"it) must be left out, to be found, got {left_out}. Pass two of them."
        )
    if run.num_bands is not None and unknown != ["noise_multiplier"]:
        raise NotImplementedError(
            f"`{unknown[0]}` must be given with `num_bands`, got none: there, only the noise "
            "multiplier can be found. Leave out `noise_multiplier` instead."
        )
    return unknown[0]


def _least_noise(run: Run, name: str, args: argparse.Namespace) -> float:
    del name
    config = run.config()
    exact = config.calibrate(
        epsilon=args.epsilon, delta=args.delta, accountant=args.accountant
    ).noise_multiplier
    exact = float(exact or 0.0)
    # Six digits are easier to copy; a little more noise spends less, up to the accountant's grid.
    short = float(rounded_up(exact))
    short_config = dataclasses.replace(config, noise_multiplier=short)
    return short if _epsilon(short_config, args) <= args.epsilon else exact


def _largest(run: Run, name: str, args: argparse.Namespace) -> int:
    """Returns the largest number of steps, or the largest batch size, that fits."""

    def config_of(count: int) -> Config:
        return _with(run, name, count).config()

    def spent(count: int) -> float:
        return _epsilon(config_of(count), args)

    config_of(1)  # refuses what is missing
    maximum = {} if name == "iterations" else {"maximum": int(run.num_examples or 1)}
    count = largest_count(spent, args.epsilon, guess=_guess(run, name, args), **maximum)
    if count == 0:
        raise ValueError(
            f"`epsilon` must be at least {rounded_up(spent(1))}, for a {_WORDS[name]} of 1, got "
            f"{args.epsilon}. Choose a larger epsilon, or more noise."
        )
    return count


def _with(run: Run, name: str, value: float) -> Run:
    changed: dict[str, Any] = {name: value}
    return dataclasses.replace(run, **changed)


def _guess(run: Run, name: str, args: argparse.Namespace) -> int:
    """Returns about what would fit, were all steps one Gaussian (see `dpbridge.accounting`)."""
    noise = args.epsilon * (run.noise_multiplier or 0.0)
    if name == "batch_size":
        steps = 2 * (run.iterations or 1) * math.log(1.25 / args.delta)
        share, limit = noise / math.sqrt(steps), int(run.num_examples or 1)
        return max(1, int(min(share, 1.0) * limit))
    sampled = run.sampling_prob or (run.batch_size or 1) / (run.num_examples or 1)
    ratio = min(noise / sampled, 2.0**20)
    return max(1, int(min(ratio * ratio / (2 * math.log(1.25 / args.delta)), 2.0**20)))


def _epsilon(config: Config, args: argparse.Namespace) -> float:
    return config.epsilon(args.delta, accountant=args.accountant)
