"""The entry point, and which command answers what."""

import argparse
import sys
from collections.abc import Callable, Sequence

from dpbridge.cli.audit import audit
from dpbridge.cli.calibrate import calibrate
from dpbridge.cli.options import make_parser
from dpbridge.cli.report import Report
from dpbridge.cli.statement import epsilon


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `dpbridge`.

    Args:
        argv: The words after `dpbridge`; by default those of the process.

    Returns:
        The exit code: 0, or 1 for an audit that refuted the claim.

    Raises:
        SystemExit: With code 2, after a line on stderr, if the options do not make sense.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        report = _COMMANDS[args.command](args)
    except (ValueError, NotImplementedError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(report.as_json() if args.json else report.as_table())
    return report.exit_code


_COMMANDS: dict[str, Callable[[argparse.Namespace], Report]] = {
    "epsilon": epsilon,
    "calibrate": calibrate,
    "audit": audit,
}
