"""Networks: images (B, C, H, W) in [0, 1] -> logits (B, K), any normalisation inside."""

from __future__ import annotations

from typing import Any

from torch import nn

from models.preact_resnet import ACTIVATIONS, PreActResNet18
from models.wide_resnet import WideResNet, depth_and_width

# What a checkpoint keeps to rebuild its network: the arguments of build_model, numbers and strings only.
Spec = dict[str, Any]


def build_model(arch: str, **kwargs: Any) -> nn.Module:
    """A network with random weights, (B, C, H, W) in [0, 1] -> logits. Raises ValueError for an unknown name or activation."""
    if kwargs.get("act", "relu") not in ACTIVATIONS:
        raise ValueError(f"unknown activation {kwargs['act']!r}; choose one of {' '.join(ACTIVATIONS)}")
    match arch:
        case "preact-resnet18":
            return PreActResNet18(**kwargs)
        case _ if arch.startswith("wide-resnet-"):
            return WideResNet(*depth_and_width(arch), **kwargs)
        case "robustbench" if kwargs:
            from models.robustbench_zoo import build_robustbench

            return build_robustbench(**kwargs)
        case _:
            raise ValueError(
                f"unknown network {arch!r}; choose preact-resnet18 or wide-resnet-DEPTH-WIDTH, as wide-resnet-28-10"
            )
