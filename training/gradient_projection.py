"""RAMP's gradient projection (arXiv 2402.06827): what an epoch of natural training teaches helps an epoch of adversarial training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BETA = 0.5


class GradientProjection:
    """An epoch's two halves, natural and adversarial training, both from the weights w at its start.

    With g_n and g_a the changes of a layer's weights (here: of each parameter tensor) in the two, it becomes
    w + beta max(cos(g_n, g_a), 0) g_n + (1 - beta) g_a. Buffers, as BatchNorm's statistics, are those of the adversarial half.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, beta: float = BETA) -> None:
        self.network, self.optimizer, self.beta = network, optimizer, beta  # the optimizer is the natural half's
        self.start: dict[str, Tensor] = {}
        self.natural: dict[str, Tensor] = {}

    def begin(self) -> None:
        """The epoch begins, with its natural half."""
        self.start, self.natural = _copy(self.network.state_dict()), {}

    def turn(self) -> None:
        """The natural half is over: back to the start, for the adversarial one."""
        self.natural = _copy(dict(self.network.named_parameters()))
        self.network.load_state_dict(self.start)

    @torch.no_grad()
    def end(self) -> None:
        """Both are over: put the network's weights together."""
        for name, weight in self.network.named_parameters():
            start = self.start[name]
            natural, adversarial = self.natural[name] - start, weight - start
            cosine = torch.cosine_similarity(natural.flatten(), adversarial.flatten(), dim=0)
            weight.copy_(start + self.beta * cosine.clamp(min=0) * natural + (1 - self.beta) * adversarial)
        self.start, self.natural = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Both halves so far."""
        return {"start": self.start, "natural": self.natural, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        device = next(self.network.parameters()).device
        self.start, self.natural = (
            {name: value.to(device) for name, value in state[part].items()} for part in ("start", "natural")
        )
        self.optimizer.load_state_dict(state["optimizer"])


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}
