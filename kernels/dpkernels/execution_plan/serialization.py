"""Configs as plain types, for checkpoints and files."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import dp_accounting

from dpkernels import _validate
from dpkernels.execution_plan.bandmf import BandMFConfig
from dpkernels.execution_plan.dpsgd import DPSGDConfig
from dpkernels.execution_plan.nonprivate import NonPrivateConfig

Config = DPSGDConfig | BandMFConfig | NonPrivateConfig


def config_to_dict(config: Config) -> dict[str, Any]:
    """Returns a config as plain types that JSON can hold.

    Raises:
        TypeError: If it is not one of the configs of this package.

    Example:
        >>> config = NonPrivateConfig(iterations=10, batch_size=4)
        >>> config_to_dict(config)
        {'type': 'NonPrivateConfig', 'iterations': 10, 'batch_size': 4}
        >>> config_from_dict(config_to_dict(config)) == config
        True
    """
    if type(config).__name__ not in _TYPES:
        raise TypeError(
            f"`config` must be one of {', '.join(_TYPES)}, got {type(config).__name__}. "
            "Save a config of your own by its own means."
        )
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    relation = fields.get("neighboring_relation")
    if relation is not None:
        fields["neighboring_relation"] = relation.name
    if "strategy" in fields:
        fields["strategy"] = list(fields["strategy"])
    return {"type": type(config).__name__, **fields}


def config_from_dict(state: Any) -> Config:
    """Returns the config that `config_to_dict` took apart, all of it checked.

    Raises:
        ValueError: If `state` is not what `config_to_dict` returns.
    """
    fields = dict(state) if isinstance(state, Mapping) else {}
    name = fields.pop("type", None)
    kind = _TYPES.get(name) if isinstance(name, str) else None
    names = {field.name for field in dataclasses.fields(kind)} if kind else set()
    if kind is None or set(fields) != names:
        raise ValueError(
            f"`state` must be what `config_to_dict` returns, got {state!r:.200}. "
            "Load an unchanged one."
        )
    relation = fields.get("neighboring_relation")
    if relation is not None:
        relations = {each.name: each for each in dp_accounting.NeighboringRelation}
        _validate.one_of("neighboring_relation", relation, relations)
        fields["neighboring_relation"] = relations[relation]
    try:
        return kind(**fields)
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from error


_TYPES: dict[Any, type[Config]] = {
    kind.__name__: kind for kind in (DPSGDConfig, BandMFConfig, NonPrivateConfig)
}
