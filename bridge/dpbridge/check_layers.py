"""What the modules of a model say by themselves, before anything is run."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from dpbridge.check_ops import split
from dpbridge.findings import Finding
from dpbridge.fix import INSTANCE_NORMS, keeps_statistics, replacement_of

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def replaceable_layers(model: nn.Module) -> list[Finding]:
    """Returns what `fix`, or taking a wrapper off, is enough for."""
    findings = []
    for name, module in model.named_modules():
        if keeps_statistics(module):
            findings.append(_statistics(module, name))
        elif isinstance(module, WRAPPERS):
            findings.append(_wrapper(module, name))
    return findings


def other_findings(model: nn.Module) -> list[Finding]:
    """Returns what is the matter with hooks, parameters and what surrounds the call."""
    return [*_hooks(model), *_placement(model), *_parameters(model), *_surroundings()]


def _statistics(module: nn.Module, name: str) -> Finding:
    is_instance = isinstance(module, INSTANCE_NORMS)
    why = (
        "Running statistics carry data from one example to the next"
        if is_instance
        else "It normalises over the batch, so examples are mixed"
    )
    try:
        new = replacement_of(module, name)
    except NotImplementedError as error:
        replacement = "nn.GroupNorm, LayerNorm or InstanceNorm, by hand: " + split(str(error))[0]
    else:
        shown = "track_running_stats=False"
        if isinstance(new, nn.GroupNorm):
            shown = f"nn.GroupNorm({new.num_groups}, {new.num_channels})"
        replacement = f"{shown}, or dpbridge.fix(model)"
    return Finding(type(module).__name__, name or "model", why, replacement)


def _wrapper(module: nn.Module, name: str) -> Finding:
    why = "It runs on several devices, which is not supported yet"
    return Finding(type(module).__name__, name or "model", why, "The module inside it, .module")


def _hooks(model: nn.Module) -> list[Finding]:
    why = "Gradients are computed in JAX, where the hook would not run"
    return [
        Finding("backward hook", name or "model", why, "Remove it.")
        for name, owner in [*model.named_modules(), *model.named_parameters()]
        if any(getattr(owner, kind, None) for kind in ("_backward_hooks", "_backward_pre_hooks"))
    ]


def _placement(model: nn.Module) -> list[Finding]:
    lazy = [name or "model" for name, module in model.named_modules() if _is_lazy(module)]
    if lazy:
        why = "They have no shape before the first batch"
        return [Finding("lazy layers", _listed(lazy), why, "Run the model on a batch first.")]
    devices = {p.device: name for name, p in model.named_parameters()}
    if len(devices) > 1:
        where = ", ".join(f"{name} ({device})" for device, name in devices.items())
        why = "All parameters must lie on one device"
        return [Finding("devices", where, why, "model.to(device)")]
    if any(device.type == "meta" for device in devices):
        why = "Parameters on the meta device have no values"
        return [Finding("devices", "model", why, "model.to_empty(device=...), and initialise it")]
    return []


def _is_lazy(module: Any) -> bool:
    # A user's own lazy class may have no other to become, and then stays one.
    is_of_the_kind = isinstance(module, LazyModuleMixin)
    return is_of_the_kind and bool(module.cls_to_become or module.has_uninitialized_params())


def _parameters(model: nn.Module) -> list[Finding]:
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    total = sum(1 for _ in model.parameters())
    if len(frozen) == total:
        why = "No parameter requires a gradient"
        return [Finding("parameters", "model", why, "Unfreeze one with requires_grad_(True).")]
    if not frozen:
        return []
    why = f"{len(frozen)} of {total} require no gradient and stay as they are"
    replacement = "None, if that is meant; else requires_grad_(True)."
    return [Finding("frozen parameters", _listed(frozen), why, replacement, blocks=False)]


def _surroundings() -> list[Finding]:
    if not torch.is_inference_mode_enabled():
        return []
    why = "Under it torch keeps no gradients"
    return [Finding("torch.inference_mode", "", why, "Leave it before training.")]


def _listed(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
