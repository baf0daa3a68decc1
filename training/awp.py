"""AWP, adversarial weight perturbation (Wu, Xia & Wang, NeurIPS 2020, arXiv 2004.05884)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class AdversarialWeights:
    """Minimises the loss where each weight tensor w is moved to w + gamma ||w|| g / ||g||, g the gradient of the training loss at w.

    Biases and norm layers (all 1-d parameters) stay. Keeps nothing from step to step.
    """

    def __init__(self, network: nn.Module, gamma: float) -> None:
        self.network, self.gamma = network, gamma

    @contextmanager
    def perturbed(self, compute_gradient: Callable[[], Any]) -> Iterator[None]:
        """Inside, the weights are moved; afterwards they are what they were, and gradients are those computed inside.

        compute_gradient: adds the training loss' gradient to that of each parameter, at the cost of its forward and backward passes.
        """
        weights = [parameter for parameter in self.network.parameters() if parameter.dim() > 1]
        kept = [weight.detach().clone() for weight in weights]
        buffers = [*self.network.buffers()]  # BatchNorm's statistics see each mini-batch once
        kept_buffers = [buffer.clone() for buffer in buffers]
        self.network.zero_grad()
        compute_gradient()
        with torch.no_grad():
            for weight in weights:
                if weight.grad is not None:
                    # A gradient of 0, or one that overflowed in half precision, has no direction.
                    scale = self.gamma * weight.norm() / weight.grad.norm().clamp(min=torch.finfo(weight.dtype).tiny)
                    weight.add_(torch.nan_to_num(scale * weight.grad, 0, 0, 0))
            for buffer, before in zip(buffers, kept_buffers, strict=True):
                buffer.copy_(before)
        self.network.zero_grad()
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, before in zip(weights, kept, strict=True):
                    weight.copy_(before)
