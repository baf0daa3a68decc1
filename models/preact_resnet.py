"""PreAct ResNet-18 with smooth activations, the network of arXiv 2105.12508: (B, C, H, W) in [0, 1] -> logits (B, K).

Pre-activation residual network (He et al. 2016, arXiv 1603.05027): softplus in the blocks, ReLU before the pooling, no input
normalisation. The state-dict names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Softplus(torch.autograd.Function):
    """log(1 + exp(x)) of kernels that are vectorised on CPUs: F.softplus' own is a third of a pass there (docs/LOG.md).

    The gradient is made from the output in float32, since the next convolution keeps that anyway: a third less memory, and as fast.
    In bfloat16 that would be too coarse.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:  # evaluations in bfloat16 were compared with this form (docs/LOG.md)
            ctx.save_for_backward(x)
            return x.abs().neg_().exp_().add_(1).log_().add_(x.relu())
        out = x.relu().sub_(x.abs().sigmoid_().log_())
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,), (kept,) = grads, ctx.saved_tensors
        if kept.dtype == torch.float32:  # sigmoid(x) = 1 - exp(-softplus(x))
            return torch.addcmul(grad, grad, kept.neg().exp_(), value=-1)
        return grad * kept.sigmoid()


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), any shape; within 1e-6 (1 + value) in float32 and 0.01 in bfloat16, the gradient within 1e-6 and 0.01 of its own."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.softplus(x)
    return _Softplus.apply(x)  # type: ignore[no-untyped-call]


def normalise(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """bn(x), (B, C, H, W). With fixed statistics on a CPU as one multiply-add: BatchNorm's own gradient is slow there (docs/LOG.md)."""
    if bn.training or x.dtype != torch.float32 or x.device.type != "cpu":
        out: Tensor = bn(x)
        return out
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
    shift = bn.bias - bn.running_mean * scale
    return torch.addcmul(shift[:, None, None], x, scale[:, None, None])


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus1": softplus,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
}


class PreActBlock(nn.Module):
    """act(bn) -> conv -> act(bn) -> conv, plus the input (through a 1 x 1 convolution where the shape changes)."""

    def __init__(self, in_planes: int, planes: int, stride: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(normalise(self.bn1, x))
        skip = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv2(self.act(normalise(self.bn2, self.conv1(out))))
        return out + skip


class PreActResNet18(nn.Module):
    """(B, C, H, W) in [0, 1] -> logits (B, num_classes), any H and W; `width` channels in the first stage, doubled in each later one."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 64, act: str = "softplus1") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        # Channels-last is faster, but not for narrow networks: oneDNN's gradients of those corrupt memory (docs/LOG.md). The first
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
