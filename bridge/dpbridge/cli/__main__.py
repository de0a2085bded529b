"""`python -m dpbridge.cli`: the same as `dpbridge`."""

import sys

from dpbridge.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
