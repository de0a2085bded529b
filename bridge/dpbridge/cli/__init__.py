"""The command line `dpbridge`: what a run spends, what fits a budget, and whether a claim holds.

Example:
    >>> code = main("epsilon --noise-multiplier 3 --sampling-prob 0.1 --steps 512 --delta 1e-6"
    ...             .split())
    mechanism               DP-SGD
    sampling                Poisson, probability 0.1
    noise multiplier        3.0, over the clip norm
    steps                   512
    neighbouring relation   add-or-remove-one
    delta                   1e-06
    epsilon (pld)           3.76969
    >>> code
    0

Each answer is asked of the config that `dpkernels.execution_plan` would make a plan of, so that
what is stated here and what a training run with that config spends cannot differ.
"""

from dpbridge.cli.commands import main

__all__ = ["main"]
