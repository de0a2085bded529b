"""What a checkpoint of `DPOptimizer` has beside the wrapped optimizer's state, and if it fits."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from dpbridge.trainable import check_seed
from dpkernels import _validate

KEY = "dpbridge"
VERSION = 1


def checked_state(state_dict: Any) -> dict[str, Any]:
    """Returns a checkpoint's private part.

    Raises:
        ValueError: If that, or the wrapped optimizer's, is missing or malformed.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            f"`state_dict` must be a dict, got {type(state_dict).__name__}. "
            "Load what DPOptimizer.state_dict returned."
        )
    own = state_dict.get(KEY)
    parts = {"version", "ledger", "noise"}
    if (
        not isinstance(own, dict)
        or set(own) - {"parameters", "journal"} != parts
        or not isinstance(own["noise"], dict)
    ):
        raise ValueError(
            f"`state_dict` must hold `{KEY}` with {', '.join(sorted(parts))}, got {own!r:.80}. "
            "Load what DPOptimizer.state_dict returned: without its ledger no epsilon holds."
        )
    if own["version"] != VERSION:
        raise ValueError(
            f"`state_dict` must be of version {VERSION}, got {own['version']!r}. "
            "Load it with the release that wrote it."
        )
    missing = {"state", "param_groups"} - set(state_dict)
    if missing:
        raise ValueError(
            f"`state_dict` must hold the wrapped optimizer's {' and '.join(sorted(missing))}, got "
            "none. Load what DPOptimizer.state_dict returned."
        )
    hint = "The checkpoint is damaged."
    try:
        steps = _validate.integer("noise.steps", own["noise"].get("steps"), hint, minimum=0)
        check_seed(own["noise"].get("seed"))
        if own.get("journal") is not None:
            _validate.integer("journal", own["journal"], hint, minimum=0)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if steps >= 2**32:
        raise ValueError(f"`noise.steps` must be below 2**32, got {steps}. {hint}")
    return own


def shapes_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, list[int]]:
    """Returns the shape of every parameter, in plain types."""
    return {name: list(parameter.shape) for name, parameter in parameters.items()}


def check_shapes(saved: Any, here: dict[str, list[int]]) -> None:
    """Refuses a checkpoint of other parameters; one of old may not say of which it is.

    Args:
        saved: What `shapes_of` returned then, or None.
        here: What it returns now.

    Raises:
        ValueError: If they differ.
    """
    if saved is None or saved == here:
        return
    others = saved if isinstance(saved, dict) else {}
    changed = [name for name in {**here, **others} if others.get(name) != here.get(name)]
    raise ValueError(
        f"`state_dict` must be of parameters of these names and shapes, got a change of "
        f"{', '.join(map(str, changed))}. Make the model as it was when it was saved."
    )
