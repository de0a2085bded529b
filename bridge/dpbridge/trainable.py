"""What can be trained privately: the checks of a model and of the optimizer to wrap."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dpbridge.devices import check_device
from dpkernels import _validate

_SEED_HINT = "Leave it out to draw the seed from the operating system."


def check_optimizer(optimizer: Any) -> None:
    """Raises unless this is a torch optimizer that takes one gradient a step."""
    is_wrapper = isinstance(getattr(optimizer, "base_optimizer", None), Optimizer)
    if not isinstance(optimizer, Optimizer) or is_wrapper:
        raise TypeError(
            f"`optimizer` must be a plain torch optimizer, got {type(optimizer).__name__}. "
            "Pass for example torch.optim.SGD(model.parameters(), lr=0.1)."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise NotImplementedError(
            "`optimizer` must step once a gradient, got LBFGS, which evaluates several in one "
            "step; each would be a release of its own. Use a first-order optimizer."
        )


_BATCH_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.LazyBatchNorm1d,
    nn.LazyBatchNorm2d,
    nn.LazyBatchNorm3d,
)


def check_model(model: Any) -> None:
    """Raises unless this is a module on one device that treats each example by itself."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module, got {type(model).__name__}. Pass the module whose "
            "parameters the optimizer holds."
        )
    for name, module in model.named_modules():
        if isinstance(module, _BATCH_NORMS):
            raise NotImplementedError(
                f"`model` must not mix examples, got {type(module).__name__} at `{name or 'model'}`"
                ", which normalises over the batch. Use GroupNorm, LayerNorm or InstanceNorm, or "
                "call dpbridge.fix(model)."
            )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise NotImplementedError(
            f"`model` must run on one device, got {type(model).__name__}; several are not "
            "supported yet. Pass the module inside it."
        )
    check_device(device_of(model))


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of all parameters; raises ValueError if there are several."""
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise ValueError(
            f"`model` must lie on one device, got {', '.join(sorted(map(str, devices)))}. "
            "Move it with model.to(device)."
        )
    return devices.pop() if devices else torch.device("cpu")


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    """Returns the name of each parameter; a tied one has the first of its names."""
    return {p: name for name, p in model.named_parameters()}


def check_processes() -> None:
    """Raises if this is one of several processes, each of which would keep a ledger of its own."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    size = torch.distributed.get_world_size()
    if size > 1:
        raise NotImplementedError(
            f"A private run must be in one process, got torch.distributed with {size}; several are "
            "not supported yet, and each would release and count by itself. Start one process."
        )


def is_module_class(value: Any) -> bool:
    """Whether this is a class of modules, where one of its modules was meant."""
    return isinstance(value, type) and issubclass(value, nn.Module)


def check_parameters(model: nn.Module, trainable: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError if the model has another parameter by a name than the optimizer."""
    found = dict(model.named_parameters())
    for name, parameter in trainable.items():
        if found.get(name) is not parameter:
            raise ValueError(
                f"`{name}` must be the parameter that the optimizer holds, got another one in "
                "the model. Make a new optimizer after replacing parameters."
            )


def check_seed(seed: Any) -> int:
    """Returns the seed if it is an integer of at most 64 bits."""
    seed = _validate.integer("seed", seed, _SEED_HINT, minimum=0)
    if seed >= 2**64:
        raise ValueError(f"`seed` must be below 2**64, got {seed}. {_SEED_HINT}")
    return seed
