"""The last layer of a network, the head, and a new one with random weights for other classes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from models.networks import Spec
from utils.modules import eval_mode

AUTO = "auto"  # find the head by running the network
MOST_CLASSES = 10**6


def with_new_head(model: nn.Module, spec: Spec, name: str, shape: tuple[int, int, int], num_classes: int) -> Spec:
    """Replace the network's last layer, in place, by one with random weights and num_classes outputs; the spec that tells it.

    name: of the layer in `model.named_modules()`, or AUTO: the last linear layer that an image of `shape` (C, H, W) passes.
    Raises ValueError if there is no such layer.
    """
    head = find_head(model, shape) if name == AUTO else name
    replace_head(model, head, num_classes)
    return spec | {"head": head, "head_classes": num_classes}


def find_head(model: nn.Module, shape: tuple[int, int, int]) -> str:
    """The name of the last linear layer, or 1 x 1 convolution, that one image passes and that has as many outputs as the network."""
    called: list[str] = []
    layers = {name: layer for name, layer in model.named_modules() if _outputs(layer) is not None}
    hooks = [layer.register_forward_hook(lambda *_, name=name: called.append(name)) for name, layer in layers.items()]
    number = outputs(model, shape)
    for hook in hooks:
        hook.remove()
    for name in reversed(called):
        if _outputs(layers[name]) == number:
            return name
    last = f", such as --head={called[-1]}" if called else ""
    raise ValueError(f"the last layer of the network, which has {number} outputs, was not found; name it{last}")


def outputs(model: nn.Module, shape: tuple[int, int, int]) -> int | None:
    """Of the network in eval mode for one image of `shape` (C, H, W); None if it gives no logits for it."""
    device = next(model.parameters(), torch.zeros(0)).device
    with eval_mode(model), torch.no_grad(), suppress(Exception):  # whatever a user's network raises
        logits: Any = model(torch.full((1, *shape), 0.5, device=device))
        if isinstance(logits, Tensor) and logits.dim() == 2:
            return logits.shape[1]
    return None


def replace_head(model: nn.Module, name: str, num_classes: int) -> None:
    """Put a new layer with num_classes outputs in the place of `name`. Raises ValueError if that is no linear layer."""
    if not isinstance(name, str) or not name or type(num_classes) is not int or not 1 <= num_classes <= MOST_CLASSES:
        raise ValueError(f"{name!r} with {num_classes!r} outputs is no last layer")
    layers = dict(model.named_modules())
    old = layers.get(name)
    if old is None or _outputs(old) is None:
        known = [each for each, layer in layers.items() if _outputs(layer) is not None]
        raise ValueError(f"{name} is no linear layer of the network; its last ones are {' '.join(known[-3:])}")
    parent, _, last = name.rpartition(".")
    place = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}  # type: ignore[union-attr]
    if isinstance(old, nn.Conv2d):
        new: nn.Module = nn.Conv2d(old.in_channels, num_classes, 1, **place)  # type: ignore[arg-type]
    else:
        new = nn.Linear(old.in_features, num_classes, **place)  # type: ignore[arg-type]
    setattr(layers[parent], last, new)


def _outputs(layer: nn.Module) -> int | None:
    """How many a linear layer or an ungrouped 1 x 1 convolution has; None for any other."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
        return layer.out_channels
    return None
