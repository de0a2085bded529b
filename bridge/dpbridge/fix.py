"""`fix`: a model without batch normalisation and without running statistics."""

import copy
from typing import Any

from torch import nn

from dpkernels import _validate

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_LAZY_BATCH_NORMS = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
_LAZY_INSTANCE_NORMS = (nn.LazyInstanceNorm1d, nn.LazyInstanceNorm2d, nn.LazyInstanceNorm3d)

# The fewest channels in a group. One channel of an image has many values; one feature of a vector
# has one, and of the few in a small group little is left once their mean and scale are taken out:
# of two, a sign. 16 is what Wu & He use where they choose the size of groups and not their number.
_CHANNELS_IN_GROUP = {
    nn.BatchNorm1d: 16,
    nn.BatchNorm2d: 2,
    nn.BatchNorm3d: 2,
    nn.SyncBatchNorm: 16,  # of any rank
}
_FEWEST_FEATURES = 3


def fix(model: nn.Module, *, max_groups: int = 32, inplace: bool = False) -> nn.Module:
    """Returns the model with group norm in place of batch norm.

    BatchNorm1d, 2d and 3d and SyncBatchNorm become GroupNorm, and an InstanceNorm that keeps
    running statistics becomes one that does not. `weight` and `bias` are kept as they are, tied
    ones tied and frozen ones frozen, under the names that they have; `running_mean`, `running_var`
    and `num_batches_tracked` are gone from the `state_dict`. A layer that is used in several places
    still is one layer. Whatever else the model holds stays as it is.

    The result is another function. GroupNorm normalises each example by itself, in training and
    in eval alike, so the outputs differ from the original's in both, and what was pretrained with
    batch norm must be trained further. Code that reads `running_mean` or `num_features` of such a
    layer, or calls `functional.batch_norm`, is not changed.

    GroupNorm has the most groups, up to `max_groups`, that divide the channels and leave at least
    2 channels in each; 16 in BatchNorm1d and SyncBatchNorm, which may see one value a channel. With
    fewer channels than that there is one group.

    Args:
        model: Any module; may itself be a batch norm.
        max_groups: The most groups of a GroupNorm.
        inplace: Whether to change `model` instead of a deep copy. Its parameters stay the same
            objects, so an optimizer over them stays valid.

    Returns:
        The changed copy, or `model`; if `model` itself is replaced, the layer in its place.

    Raises:
        TypeError: If `model` is no module.
        ValueError: If `max_groups` is below 1.
        NotImplementedError: If a layer has no replacement: it is lazy and has not seen a batch, is
            of a class derived from these, which may do more than normalise, has hooks, or has so
            few features that nothing would be left of them. Nothing is changed then.

    Source:
        Wu and He 2018, "Group Normalization", section 4.1.

    Example:
        >>> fixed = fix(nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)))
        >>> fixed[1].num_groups, fixed[1].num_channels
        (32, 64)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module, got {type(model).__name__}. Pass the module to "
            "be trained."
        )
    max_groups = _validate.integer("max_groups", max_groups, "Pass for example 32.", minimum=1)
    replacements_of(model, max_groups=max_groups)
    if not inplace:
        model = copy.deepcopy(model)
    replacements = replacements_of(model, max_groups=max_groups)
    for parent in list(model.modules()):
        # Not named_children, which skips the second name of a layer.
        for name, child in parent._modules.items():
            if child in replacements:
                parent.add_module(name, replacements[child])
    return replacements.get(model, model)


def replacements_of(model: nn.Module, *, max_groups: int = 32) -> dict[Any, nn.Module]:
    """Returns the new layer for each that is to be replaced; they share their parameters.

    Raises:
        NotImplementedError: If there is none for a layer.
    """
    found = {
        module: replacement_of(module, name, max_groups=max_groups)
        for name, module in model.named_modules()
    }
    return {module: layer for module, layer in found.items() if layer is not None}


def replacement_of(module: nn.Module, name: str, *, max_groups: int = 32) -> nn.Module | None:
    """Returns the layer to put in the place of a module, or None if it can stay.

    Args:
        module: Any module. The layer returned shares its parameters.
        name: Its path in the model, for messages.
        max_groups: The most groups of a GroupNorm.

    Raises:
        NotImplementedError: If it cannot stay and there is none.
    """
    if not keeps_statistics(module):
        return None
    place = f"{type(module).__name__} at `{name or 'model'}`"
    reason = _why_not(module)
    if reason is not None:
        what, advice = reason
        raise NotImplementedError(
            f"`model` must have layers that `fix` can replace, got {place}, {what}. {advice}"
        )
    is_instance = isinstance(module, INSTANCE_NORMS)
    new: Any = _instance_norm(module) if is_instance else _group_norm(module, max_groups)
    new.weight, new.bias = module.weight, module.bias
    new.affine = module.weight is not None
    result: nn.Module = new.train(module.training)
    return result


def keeps_statistics(module: nn.Module) -> bool:
    """Whether this is a batch norm in any form, or an instance norm with running statistics."""
    if isinstance(module, (*INSTANCE_NORMS, *_LAZY_INSTANCE_NORMS)):
        return bool(module.track_running_stats)
    return isinstance(module, (*_CHANNELS_IN_GROUP, *_LAZY_BATCH_NORMS))


def _why_not(module: Any) -> tuple[str, str] | None:
    """Returns what keeps a layer from being replaced, and what to do about it, or None."""
    if isinstance(module, (*_LAZY_BATCH_NORMS, *_LAZY_INSTANCE_NORMS)):
        return "which has no number of channels yet", "Run the model on a batch first."
    if type(module) not in (*_CHANNELS_IN_GROUP, *INSTANCE_NORMS):
        return (
            "a class derived from torch's",
            "As it may do more than normalise, replace it by hand.",
        )
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for name in hooks):
        return "with hooks, which would be lost", "Remove them first."
    is_flat = _CHANNELS_IN_GROUP.get(type(module)) == 16
    if is_flat and module.num_features < _FEWEST_FEATURES:
        return (
            f"with {module.num_features} features, of which a group norm leaves no more than signs",
            "Take it out; if each has many values, put in nn.GroupNorm by hand.",
        )
    return None


def _group_norm(module: Any, max_groups: int) -> nn.Module:
    channels = module.num_features
    groups = _groups(channels, _CHANNELS_IN_GROUP[type(module)], max_groups)
    return nn.GroupNorm(groups, channels, eps=module.eps, affine=False)


def _groups(channels: int, least: int, most: int) -> int:
    """Returns the largest number of groups up to `most` with `least` channels or more in each."""
    fitting = [n for n in range(1, min(most, channels // least) + 1) if channels % n == 0]
    return max(fitting, default=1)


def _instance_norm(module: Any) -> nn.Module:
    kind: Any = type(module)
    new: nn.Module = kind(module.num_features, eps=module.eps, momentum=module.momentum)
    return new
