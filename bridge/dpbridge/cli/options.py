"""The options of the command line."""

import argparse
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from dpbridge.cli.run import RELATIONS, SAMPLINGS, Run
from dpkernels.composition import ACCOUNTANTS

_PICTURES = (".png", ".pdf", ".svg")
_NOISE_HELP = (
    "standard deviation of the noise over the sensitivity, which is the clip norm, or twice the "
    "clip norm for replace-one"
)


class Parser(argparse.ArgumentParser):
    """Refuses in one line, whichever command it is for."""

    def error(self, message: str) -> NoReturn:
        """Writes a line to stderr and exits with 2."""
        line = " ".join(message.split())
        sys.stderr.write(f"dpbridge: error: {_in_options(line)}\n")
        sys.exit(2)


def make_parser() -> Parser:
    """Returns the parser of `dpbridge`."""
    parser = Parser(
        prog="dpbridge",
        description="What differentially private training spends, what fits a budget, "
        "and whether a claim survives an attack.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, add_options) in _COMMANDS.items():
        sentence = f"{text[0].upper()}{text[1:]}."
        command = commands.add_parser(name, help=text, description=sentence, allow_abbrev=False)
        add_options(command)
        text = "print one JSON object instead of a table"
        command.add_argument("--json", action="store_true", help=text)
    return parser


def run_of(args: argparse.Namespace) -> Run:
    """Returns the run that the options describe."""
    return Run(**{field.name: getattr(args, field.name) for field in fields(Run)})


def _add_epsilon(parser: argparse.ArgumentParser) -> None:
    _add_privacy(parser, accountants=(*ACCOUNTANTS, "both"))
    _add_plot(parser)
    _add_run(parser, is_complete=True)


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epsilon", type=float, required=True, help="what the run may spend")
    _add_privacy(parser, accountants=ACCOUNTANTS)
    _add_plot(parser)
    _add_run(parser, is_complete=False)


def _add_audit(parser: argparse.ArgumentParser) -> None:
    text = "claim to attack; by default the epsilon that the accountant states"
    parser.add_argument("--epsilon", type=float, help=text)
    _add_privacy(parser, accountants=ACCOUNTANTS, hint=": 0.01 to 0.1 lets an attack tell most")
    text = "how often the run is simulated on each of two neighbouring datasets (1000)"
    parser.add_argument("--trials", dest="num_trials", type=int, default=1000, help=text)
    text = "probability with which a true claim is refuted (0.05)"
    parser.add_argument("--significance", type=float, default=0.05, help=text)
    text = "of the simulations; by default the operating system's"
    parser.add_argument("--seed", type=int, help=text)
    _add_run(parser, is_complete=True)


def _add_privacy(
    parser: argparse.ArgumentParser,
    *,
    accountants: tuple[str, ...],
    hint: str = ", well below 1 / dataset size",
) -> None:
    text = f"the delta of (epsilon, delta){hint}"
    parser.add_argument("--delta", type=float, required=True, help=text)
    text = "by default the tightest that can answer for the sampling"
    parser.add_argument("--accountant", choices=accountants, help=text)


def _add_plot(parser: argparse.ArgumentParser) -> None:
    text = f"where to draw epsilon against steps ({', '.join(_PICTURES)})"
    parser.add_argument("--plot", type=_picture, metavar="FILE", help=text)


def _add_run(parser: argparse.ArgumentParser, *, is_complete: bool) -> None:
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--noise-multiplier", type=float, metavar="X", required=is_complete, help=_NOISE_HELP
    )
    text = "number of optimizer steps"
    group.add_argument(
        "--steps", dest="iterations", type=int, metavar="N", required=is_complete, help=text
    )
    text = "how batches are drawn: each example independently, or a fixed number of them"
    group.add_argument("--sampling", choices=SAMPLINGS, default="poisson", help=text)
    text = "probability with which an example is in a batch"
    group.add_argument("--sampling-prob", type=float, metavar="P", help=text)
    text = "instead of a probability: size of the batches, which is the mean one for poisson"
    group.add_argument("--batch-size", type=int, metavar="N", help=text)
    text = "number of examples, with --batch-size or --truncated-batch-size"
    group.add_argument("--dataset-size", dest="num_examples", type=int, metavar="N", help=text)
    text = "largest batch of poisson sampling: of larger ones, a part is drawn"
    group.add_argument("--truncated-batch-size", type=int, metavar="N", help=text)
    text = "noise correlated between steps (BandMF): batches from so many groups in turn"
    group.add_argument("--num-bands", type=int, metavar="N", help=text)
    text = "with --num-bands, instead of --batch-size: how often an example takes part on average"
    group.add_argument("--expected-participations", type=float, metavar="X", help=text)
    text = "which datasets are neighbours; by default as the sampling has it"
    group.add_argument("--neighboring-relation", choices=tuple(RELATIONS), help=text)


def _picture(value: str) -> Path:
    path = Path(value)
    if path.suffix not in _PICTURES:
        listed = ", ".join(_PICTURES)
        raise argparse.ArgumentTypeError(f"must end in one of {listed}, got {value!r}")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be in a folder that exists, got {value!r}")
    return path


def _in_options(message: str) -> str:
    """Returns a message of the library in the words of the command line."""
    for name, relation in RELATIONS.items():
        message = message.replace(repr(relation), name).replace(str(relation), name)

    def renamed(found: re.Match[str]) -> str:
        text = re.sub(r"\w+", lambda word: _OPTIONS.get(word[0], word[0]), found[1])
        return found[0] if text == found[1] else text

    return re.sub(r"`([^`]+)`", renamed, message)


_COMMANDS = {
    "epsilon": ("state the epsilon that a run spends", _add_epsilon),
    "calibrate": (
        "find the noise multiplier, the number of steps or the batch size, whichever is left out",
        _add_calibrate,
    ),
    "audit": ("attack a run, and compare what is found with what it claims", _add_audit),
}

_SHARED = ("epsilon", "delta", "accountant", "significance", "plot")
_SAME_NAME = (*_SHARED, *(field.name for field in fields(Run)))
_OPTIONS = {name: f"--{name.replace('_', '-')}" for name in _SAME_NAME} | {
    "iterations": "--steps",
    "num_examples": "--dataset-size",
    "num_trials": "--trials",
}
