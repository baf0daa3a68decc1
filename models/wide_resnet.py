"""Wide residual networks (Zagoruyko and Komodakis 2016, arXiv 1605.07146): (B, C, H, W) in [0, 1] -> logits (B, K).

Three stages of pre-activation blocks, no dropout, no input normalisation. The state-dict names are those of the published robust
networks of TRADES' kind (in RobustBench those of `WideResNet`). Not here, but by RobustBench itself as RB_{id}: DeepMind's variant
(`DMWideResNet`: Gowal2020..., Rebuffi2021..., Wang2023...), whose names and padding differ, and those that normalise their images,
which their weights do not tell.
"""

from __future__ import annotations

import re
from collections import OrderedDict

import torch
from torch import Tensor, nn

from models.layers import ACTIVATIONS, PreActBlock, normalise
from models.networks import NetworkSpec, Spec, StateDict, register_network


class WideResNet(nn.Module):
    """(B, C, H, W) in [0, 1] -> logits (B, num_classes), any H and W; stages of 16, 32, 64 times `widen` channels, (depth - 4) / 6 blocks.

    Activations other than ReLU take its place everywhere. Raises ValueError unless the depth is 6n + 4.
    """

    def __init__(self, depth: int, widen: int, num_classes: int = 10, in_channels: int = 3, act: str = "relu") -> None:
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"the depth of a wide residual network is 6n + 4 (10, 16, 22, 28, 34, ...), not {depth}")
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        planes = 16
        for stage in range(3):
            out, blocks = 16 * widen * 2**stage, []
            for block in range((depth - 4) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(PreActBlock(planes, out, stride, self.act, shortcut="convShortcut"))
                planes = out
            self.add_module(f"block{stage + 1}", nn.Sequential(OrderedDict(layer=nn.Sequential(*blocks))))
            # Faster, and safe for multiples of 16 channels; the first convolution stays plain, as in the PreAct ResNet-18.
            self.get_submodule(f"block{stage + 1}").to(memory_format=torch.channels_last)
        self.bn1 = nn.BatchNorm2d(planes)
        self.fc = nn.Linear(planes, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x).contiguous(memory_format=torch.channels_last)
        for stage in range(3):
            out = self.get_submodule(f"block{stage + 1}")(out)
        return self.fc(self.act(normalise(self.bn1, out)).mean((2, 3)))


def _recognise(state: StateDict) -> Spec | None:
    if not {"conv1.weight", "fc.weight", "block1.layer.0.conv1.weight"} <= state.keys():
        return None
    blocks = sum(re.fullmatch(r"block1\.layer\.\d+\.conv1\.weight", name) is not None for name in state)
    arch = f"wide-resnet-{6 * blocks + 4}-{len(state['block1.layer.0.conv1.weight']) // 16}"
    return {"arch": arch, "num_classes": len(state["fc.weight"]), "in_channels": state["conv1.weight"].shape[1]}


register_network(
    NetworkSpec(
        name="wide-resnet-DEPTH-WIDTH",
        summary="wide residual network, such as wide-resnet-28-10",
        build=WideResNet,
        recognise=_recognise,
        small={"arch": "wide-resnet-10-1"},
        title="wide residual network",
    )
)
