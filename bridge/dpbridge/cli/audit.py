"""An attack on a run, and what it says about the claimed epsilon."""

import argparse

from dpbridge.cli.options import run_of
from dpbridge.cli.report import Report, rounded_down, rounded_up
from dpbridge.cli.run import Config
from dpbridge.cli.statement import described, described_rows
from dpkernels import _validate
from dpkernels.auditing import audit_plan

_EXAMPLES = 20  # where the size of the dataset is no part of the mechanism
_MAX_POSITIONS = 2**29  # of 4 bytes each, and about as much again for the noise


def audit(args: argparse.Namespace) -> Report:
    """Answers `dpbridge audit`."""
    config = run_of(args).config()
    num_examples = config.num_examples or _EXAMPLES
    _check_size(args, config, num_examples)
    claimed, accountant = _claim(args, config)
    found = audit_plan(
        config.make(),
        delta=args.delta,
        num_trials=args.num_trials,
        significance=args.significance,
        rng=args.seed,
        num_examples=num_examples,
        epsilon_claimed=claimed,
    )
    values = {
        "epsilon_claimed": claimed,
        "accountant": accountant,
        "epsilon_lower_bound": found.epsilon_lower_bound,
        "holds": found.holds,
        "significance": found.significance,
        "trials": args.num_trials,
        "examples": num_examples,
        "seed": args.seed,
    }
    rows = [
        ("simulated", f"{args.num_trials} runs on each of two datasets of {num_examples} examples"),
        (f"epsilon claimed ({accountant or 'by you'})", rounded_up(claimed)),
        (
            "epsilon found, at least",
            f"{rounded_down(found.epsilon_lower_bound)}, "
            f"with confidence {1 - found.significance:.6g}",
        ),
        ("holds", _VERDICTS[found.holds]),
    ]
    return Report(
        described(args, config) | values,
        described_rows(args, config) + rows,
        exit_code=0 if found.holds else 1,
    )


def _claim(args: argparse.Namespace, config: Config) -> tuple[float, str | None]:
    """Returns the claimed epsilon and the accountant that states it, if one does."""
    if args.epsilon is None:
        accountant = config.check_accountant(args.accountant)
        return config.epsilon(args.delta, accountant=accountant), accountant
    if args.accountant is not None:
        raise ValueError(
            f"`accountant` must be left out with `epsilon`, got {args.accountant}: the claim is "
            "either its own or yours. Leave out one of them."
        )
    return _validate.non_negative("epsilon", args.epsilon, "Or leave it out."), None


_VERDICTS = {
    True: "yes: this attack found no more than is claimed, which proves nothing about others",
    False: "no: more was found than is claimed",
}


def _check_size(args: argparse.Namespace, config: Config, num_examples: int) -> None:
    hint = "1000 is usual."
    trials = _validate.integer("num_trials", args.num_trials, hint, minimum=2)
    positions = trials * config.iterations * max(num_examples, 64)
    if positions > _MAX_POSITIONS:
        raise ValueError(
            "`num_trials` times `iterations` times the examples must be at most "
            f"{_MAX_POSITIONS}, to fit into memory, got {positions}. Audit a shorter run of the "
            "same noise and sampling, on a smaller dataset where its size is public."
        )
