"""Which accountant a training accountant asks, as JAX Privacy 1.0 configured it.

Example:
    >>> config = PldAccountantConfig(value_discretization_interval=1e-3)
    >>> config.create_accountant().neighboring_relation.name
    'ADD_OR_REMOVE_ONE'
"""

import abc
import dataclasses

import dp_accounting
import numpy as np

from dpkernels import composition


class DpAccountantConfig(abc.ABC):
    """Settings of one accountant."""

    @abc.abstractmethod
    def create_accountant(self) -> dp_accounting.PrivacyAccountant:
        """Returns dp_accounting's own accountant for the add-or-remove-one relation.

        The accountants of `analysis` ask `composition_accountant`, which also holds where floating
        point does not.
        """

    @property
    @abc.abstractmethod
    def composition_accountant(self) -> composition.Accountant:
        """The accountant of these settings in `dpkernels.composition`."""


def _default_orders() -> tuple[float, ...]:
    fractions, small = np.linspace(1.01, 8, 50), range(8, 64)
    large = np.linspace(65, 512, 10, dtype=int)
    return tuple(float(order) for order in (*fractions, *small, *large))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RdpAccountantConfig(DpAccountantConfig):
    """Rényi divergences.

    Args:
        orders: Orders of the divergences, above 1. By default the 116 of JAX Privacy 1.0.

    Raises:
        ValueError: If an order is not above 1, or there is none.
    """

    orders: tuple[float, ...] = dataclasses.field(default_factory=_default_orders)

    def __post_init__(self) -> None:
        object.__setattr__(self, "orders", tuple(self.orders))
        if not self.orders:
            raise ValueError("`orders` must not be empty, got (). Leave it out for the usual ones.")
        composition.rdp_accountant(self.orders)  # checks them

    def create_accountant(self) -> dp_accounting.rdp.RdpAccountant:
        """Returns dp_accounting's own accountant."""
        return dp_accounting.rdp.RdpAccountant(
            self.orders, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
        )

    @property
    def composition_accountant(self) -> composition.Accountant:
        """The accountant of these settings in `dpkernels.composition`."""
        return composition.rdp_accountant(self.orders)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PldAccountantConfig(DpAccountantConfig):
    """Privacy loss distributions.

    Args:
        value_discretization_interval: Width of the grid of losses. A wider one overstates epsilon.

    Raises:
        ValueError: If the interval is not positive and finite.
        TypeError: If it is no number.
    """

    value_discretization_interval: float = 1e-4

    def __post_init__(self) -> None:
        composition.pld_accountant(self.value_discretization_interval)  # checks it

    def create_accountant(self) -> dp_accounting.pld.PLDAccountant:
        """Returns dp_accounting's own accountant."""
        return dp_accounting.pld.PLDAccountant(
            dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
            self.value_discretization_interval,
        )

    @property
    def composition_accountant(self) -> composition.Accountant:
        """The accountant of these settings in `dpkernels.composition`."""
        return composition.pld_accountant(self.value_discretization_interval)
