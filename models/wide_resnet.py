"""Wide residual networks (Zagoruyko and Komodakis 2016, arXiv 1605.07146): (B, C, H, W) in [0, 1] -> logits (B, K).

Three stages of pre-activation blocks, no dropout, no input normalisation. The state-dict names are those of the published robust
networks of TRADES' kind (in RobustBench those of `WideResNet`). Not here, but by RobustBench itself as RB_{id}: DeepMind's variant
(`DMWideResNet`: Gowal2020..., Rebuffi2021..., Wang2023...), whose names and padding differ, and those that normalise their images,
which their weights do not tell.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.preact_resnet import ACTIVATIONS, normalise


def depth_and_width(arch: str) -> tuple[int, int]:
    """What `wide-resnet-DEPTH-WIDTH` says, as (28, 10). Raises ValueError unless both are numbers below 1000 and the depth is 6n + 4."""
    found = re.fullmatch("wide-resnet-([1-9][0-9]{0,2})-([1-9][0-9]{0,2})", arch)
    if not found:
        raise ValueError(f"{arch!r} is no wide-resnet-DEPTH-WIDTH, such as wide-resnet-28-10")
    depth, width = int(found[1]), int(found[2])
    if depth < 10 or depth % 6 != 4:
        raise ValueError(
            f"the depth of a wide residual network is 6n + 4 (10, 16, 22, 28, 34, ...), that of {arch} is not"
        )
    return depth, width


class WideBlock(nn.Module):
    """act(bn) -> conv -> act(bn) -> conv, plus the input (where the shape changes, plus a 1 x 1 convolution of its act(bn))."""

    def __init__(self, in_planes: int, planes: int, stride: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        if stride != 1 or in_planes != planes:
            self.convShortcut = nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(normalise(self.bn1, x))
        skip = self.convShortcut(out) if hasattr(self, "convShortcut") else x
        out = self.conv2(self.act(normalise(self.bn2, self.conv1(out))))
        return out + skip


class WideResNet(nn.Module):
    """(B, C, H, W) in [0, 1] -> logits (B, num_classes), any H and W; stages of 16, 32, 64 times `widen` channels, (depth - 4) / 6 blocks.

    Activations other than ReLU take its place everywhere.
    """

    def __init__(self, depth: int, widen: int, num_classes: int = 10, in_channels: int = 3, act: str = "relu") -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        planes = 16
        for stage in range(3):
            out, blocks = 16 * widen * 2**stage, []
            for block in range((depth - 4) // 6):
                blocks.append(WideBlock(planes, out, 2 if stage > 0 and block == 0 else 1, self.act))
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
