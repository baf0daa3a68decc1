"""RAMP's gradient projection (arXiv 2402.06827): each epoch combines an update by natural (standard) and one by adversarial training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

BETA = 0.5
Phase = TypeVar("Phase")


class GradientProjection:
    """An epoch's two halves, natural and adversarial training, both from the weights w at its start.

    With g_n and g_a the changes of a layer's weights (here: of a parameter tensor) in the two halves, the weights become
    w + beta max(cos(g_n, g_a), 0) g_n + (1 - beta) g_a. Buffers, such as BatchNorm's statistics, are those of the adversarial half.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, beta: float = BETA) -> None:
        self.network, self.optimizer, self.beta = network, optimizer, beta  # the natural half has its own momentum
        self.start: dict[str, Tensor] = {}
        self.natural: dict[str, Tensor] = {}

    def halves(self, natural: Phase, adversarial: Phase, natural_done: bool) -> Iterator[Phase]:
        """The remaining phases of an epoch, of two; the caller trains each for one pass over the data before it takes the next."""
        if not self.start:
            self.begin()
        if not natural_done:
            yield natural
        if not self.natural:
            self.switch()
        yield adversarial
        self.end()

    def begin(self) -> None:
        """Before the natural half: remember the weights."""
        self.start, self.natural = _copy(self.network.state_dict()), {}

    def switch(self) -> None:
        """After the natural half: remember its result, go back to the epoch's start for the adversarial one."""
        self.natural = _copy(dict(self.network.named_parameters()))
        self.network.load_state_dict(self.start)

    @torch.no_grad()
    def end(self) -> None:
        """After both: combine the two updates."""
        for name, weight in self.network.named_parameters():
            start = self.start[name]
            natural, adversarial = self.natural[name] - start, weight - start
            cosine = torch.cosine_similarity(natural.flatten(), adversarial.flatten(), dim=0)
            weight.copy_(start + self.beta * cosine.clamp(min=0) * natural + (1 - self.beta) * adversarial)
        self.start, self.natural = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Weights at the epoch's start and after its natural half, and the natural half's optimizer."""
        return {"start": self.start, "natural": self.natural, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`."""
        device = next(self.network.parameters()).device
        self.start, self.natural = (
            {name: value.to(device) for name, value in state[part].items()} for part in ("start", "natural")
        )
        self.optimizer.load_state_dict(state["optimizer"])


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}
