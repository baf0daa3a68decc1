"""PreAct ResNet-18 with smooth activations, the network of arXiv 2105.12508: (B, C, H, W) in [0, 1] -> logits (B, K).

Pre-activation residual network (He et al. 2016, arXiv 1603.05027): softplus in the blocks, ReLU before the pooling, no input
normalisation. The state-dict names are those of the published checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import ACTIVATIONS, PreActBlock, normalise
from models.networks import NetworkSpec, Spec, StateDict, register_network


class PreActResNet18(nn.Module):
    """(B, C, H, W) in [0, 1] -> logits (B, num_classes), any H and W; `width` channels in the first stage, doubled in each later one."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 64, act: str = "softplus1") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        # Channels-last is faster, but not for narrow networks: oneDNN's gradients of those corrupt memory (docs/log.md). The first
        # convolution stays plain, so that the gradient of images is laid out as they are.
        self.layout = torch.contiguous_format if width % 16 else torch.channels_last
        planes = width
        for stage in range(4):
            out, stride = width * 2**stage, 1 if stage == 0 else 2
            blocks = PreActBlock(planes, out, stride, ACTIVATIONS[act]), PreActBlock(out, out, 1, ACTIVATIONS[act])
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            self.get_submodule(f"layer{stage + 1}").to(memory_format=self.layout)
            planes = out
        self.bn = nn.BatchNorm2d(planes)
        self.linear = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x).contiguous(memory_format=self.layout)
        for stage in range(4):
            out = self.get_submodule(f"layer{stage + 1}")(out)
        return self.linear(F.relu(normalise(self.bn, out)).mean((2, 3)))


def _recognise(state: StateDict) -> Spec | None:
    if not {"conv1.weight", "linear.weight", "layer1.0.bn1.weight"} <= state.keys():
        return None
    width, in_channels = state["conv1.weight"].shape[:2]
    sizes = {"num_classes": len(state["linear.weight"]), "in_channels": in_channels, "width": width}
    return {"arch": "preact-resnet18", **sizes}


register_network(
    NetworkSpec(
        name="preact-resnet18",
        summary="PreAct ResNet-18 with softplus, the paper's",
        build=PreActResNet18,
        recognise=_recognise,
        small={"arch": "preact-resnet18", "width": 4},
        title="PreAct ResNet-18",
        act="softplus1",
        width=64,
        finetune_lr=0.05,
    )
)
