"""What a composition of private releases spends, and the noise that a budget allows.

An event says what was released (see dp_accounting); an accountant says what that spends.

Example:
    >>> import dp_accounting
    >>> step = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(3.0))
    >>> run = dp_accounting.SelfComposedDpEvent(step, 512)
    >>> epsilon = epsilon_of_event(run, 1e-6)
    >>> round(epsilon, 2)
    3.77
    >>> delta_of_event(run, epsilon) <= 1e-6
    True
"""

from dpkernels.composition.profile import (
    ACCOUNTANTS,
    Accountant,
    delta_of_event,
    epsilon_of_event,
    pld_accountant,
    rdp_accountant,
)
from dpkernels.composition.search import (
    largest_count,
    smallest_noise_multiplier,
    smallest_within,
)

__all__ = [
    "ACCOUNTANTS",
    "Accountant",
    "delta_of_event",
    "epsilon_of_event",
    "largest_count",
    "pld_accountant",
    "rdp_accountant",
    "smallest_noise_multiplier",
    "smallest_within",
]
