"""Which threat model a training batch meets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attacks.threat import Threat


class EAT:
    """E-AT's adaptive draw (arXiv 2105.12508, section 4): one threat per batch, more often the one with the larger training error.

    The error is 1 - right / seen, counted over the whole run. With a single threat this is plain adversarial training.
    """

    def __init__(self, threats: Sequence[Threat]) -> None:
        self.threats = tuple(threats)
        self.right = [0] * len(threats)  # examples classified right under attack, for each threat
        self.seen = [0] * len(threats)

    def errors(self) -> list[float]:
        """Running error of each threat; 1 where it was not met yet."""
        return [1 - right / seen if seen else 1.0 for right, seen in zip(self.right, self.seen, strict=True)]

    def probabilities(self) -> list[float]:
        """Chance of each threat to be drawn: even until each was met (and if none errs), then in proportion to its error."""
        errors = self.errors()
        if 0 in self.seen or sum(errors) == 0:
            return [1 / len(errors)] * len(errors)
        return [error / sum(errors) for error in errors]

    def draw(self, generator: torch.Generator) -> int:
        """Index of the threat that the next batch meets."""
        return int(torch.multinomial(torch.tensor(self.probabilities()), 1, generator=generator))

    def observe(self, index: int, right: Tensor) -> None:
        """Count an update's outcome under threat `index`: right (B,) bool, its examples classified right under attack."""
        self.right[index] += int(right.sum())  # waits for the device, once an update
        self.seen[index] += len(right)
