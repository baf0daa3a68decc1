"""What the networks of this folder are made of: activations, BatchNorm that is quick on CPUs, the pre-activation block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


class _Softplus(torch.autograd.Function):
    """log(1 + exp(x)) of kernels that are vectorised on CPUs: F.softplus' own is a third of a pass there (docs/log.md).

    The gradient is made from the output in float32, since the next convolution keeps that anyway: a third less memory, and as fast.
    In bfloat16 that would be too coarse.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:  # evaluations in bfloat16 were compared with this form (docs/log.md)
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
        if x.dtype == torch.float32:
            return F.softplus(x)
        # CUDA's autocast makes it float32, which the next convolution casts back: two kernels more, each way.
        with torch.autocast(x.device.type, enabled=False):
            return F.softplus(x)
    return _Softplus.apply(x)  # type: ignore[no-untyped-call]


def normalise(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """bn(x), (B, C, H, W). With fixed statistics on a CPU as one multiply-add: BatchNorm's own gradient is slow there (docs/log.md)."""
    if bn.training or x.dtype != torch.float32 or x.device.type != "cpu":
        out: Tensor = bn(x)
        return out
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
    shift = bn.bias - bn.running_mean * scale
    return torch.addcmul(shift[:, None, None], x, scale[:, None, None])


ACTIVATIONS: dict[str, Activation] = {
    "softplus1": softplus,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
}


class PreActBlock(nn.Module):
    """act(bn) -> conv -> act(bn) -> conv, plus the input (where the shape changes: plus a 1 x 1 convolution of its act(bn)).

    shortcut: that convolution's published name in the state dict, "shortcut.0" or one without a dot.
    """

    def __init__(self, in_planes: int, planes: int, stride: int, act: Activation, shortcut: str = "shortcut.0") -> None:
        super().__init__()
        self.act = act
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut_name = shortcut if stride != 1 or in_planes != planes else None
        if self.shortcut_name:
            convolution = nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False)
            name, dot, _ = shortcut.partition(".")
            self.add_module(name, nn.Sequential(convolution) if dot else convolution)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(normalise(self.bn1, x))
        skip = self.get_submodule(self.shortcut_name)(out) if self.shortcut_name else x
        out = self.conv2(self.act(normalise(self.bn2, self.conv1(out))))
        return out + skip
