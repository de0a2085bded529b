"""What a run spends, with all that an epsilon is no statement without."""

import argparse
from collections.abc import Sequence
from typing import Any

from dpbridge.cli.chart import check_matplotlib, save_chart
from dpbridge.cli.options import run_of
from dpbridge.cli.report import Report, Row, rounded_up
from dpbridge.cli.run import Config, relation_name
from dpkernels.composition import ACCOUNTANTS
from dpkernels.execution_plan import BandMFConfig, config_to_dict


def epsilon(args: argparse.Namespace) -> Report:
    """Answers `dpbridge epsilon`."""
    config = run_of(args).config()
    accountants = ACCOUNTANTS if args.accountant == "both" else (args.accountant,)
    return state(args, config, [config.check_accountant(name) for name in accountants])


def state(args: argparse.Namespace, config: Config, accountants: Sequence[str]) -> Report:
    """Returns a report of what a run spends, and draws it where that is asked for."""
    if args.plot is not None:
        check_matplotlib()
    epsilons = {name: config.epsilon(args.delta, accountant=name) for name in accountants}
    values = described(args, config) | {"epsilon": epsilons}
    rows = described_rows(args, config)
    rows += [(f"epsilon ({name})", rounded_up(value)) for name, value in epsilons.items()]
    if args.plot is not None:
        save_chart(args.plot, config, args.delta, accountants)
        values["plot"] = str(args.plot)
        rows.append(("plot", str(args.plot)))
    return Report(values, rows)


def described(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Returns what an epsilon is the epsilon of, for programs."""
    return {
        "command": args.command,
        "config": config_to_dict(config),
        "neighboring_relation": config.relation.name,
        "delta": args.delta,
    }


def described_rows(args: argparse.Namespace, config: Config) -> list[Row]:
    """Returns what an epsilon is the epsilon of, for people."""
    relation = relation_name(config.relation)
    over = "twice the clip norm" if relation == "replace-one" else "the clip norm"
    mechanism = "DP-SGD"
    if isinstance(config, BandMFConfig):
        mechanism = f"BandMF, {config.num_bands} bands"
    return [
        ("mechanism", mechanism),
        ("sampling", _sampling(config)),
        ("noise multiplier", f"{config.noise_multiplier}, over {over}"),
        ("steps", str(config.iterations)),
        ("neighbouring relation", relation),
        ("delta", str(args.delta)),
    ]


def _sampling(config: Config) -> str:
    if isinstance(config, BandMFConfig):
        text = (
            f"Poisson within {config.num_bands} groups in turn, "
            f"probability {rounded_up(config.sampling_prob)}"
        )
    elif config.sampling_prob is None:
        return f"{config.batch_size} of {config.num_examples} examples, without replacement"
    else:
        text = f"Poisson, probability {rounded_up(config.sampling_prob)}"
    if config.truncated_batch_size is not None:
        text += f", at most {config.truncated_batch_size} of {config.num_examples} examples"
    return text
