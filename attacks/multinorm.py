"""Which threat model a training batch meets."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attacks.threat import Threat
from utils.training import OnItsWay


class EAT:
    """E-AT's adaptive draw (arXiv 2105.12508, section 4): one threat per batch, more often the one with the larger training error.

    The error is 1 - right / seen, counted over the whole run. A draw knows all updates but the last one, so that no device has to
    finish that before the next is prepared. With a single threat this is plain adversarial training.
    """

    def __init__(self, threats: Sequence[Threat]) -> None:
        self.threats = tuple(threats)
        self.right = [0] * len(threats)  # examples classified right under attack, for each threat
        self.seen = [0] * len(threats)
        self._coming: deque[tuple[int, OnItsWay, int]] = deque()  # updates not counted yet: threat, right, seen

    def errors(self) -> list[float]:
        """Running error of each threat after all updates; 1 where it was not met yet. Waits for the device."""
        self._count()
        return self._errors()

    def probabilities(self) -> list[float]:
        """Chance of each threat to be drawn, by the updates counted so far.

        Even until each was met (and if none errs), then in proportion to its error.
        """
        errors = self._errors()
        if 0 in self.seen or sum(errors) == 0:
            return [1 / len(errors)] * len(errors)
        return [error / sum(errors) for error in errors]

    def draw(self, generator: torch.Generator) -> int:
        """Index of the threat that the next batch meets."""
        self._count(all_but=1)
        return int(torch.multinomial(torch.tensor(self.probabilities()), 1, generator=generator))

    def observe(self, index: int, right: Tensor, seen: int) -> None:
        """An update's outcome under threat `index`: how many examples were classified right under attack, (), of how many."""
        self._coming.append((index, OnItsWay(right), seen))

    def state_dict(self) -> dict[str, Any]:
        """Counts, and the updates not counted yet as (threat, right, seen). Waits for the device."""
        coming = [(index, right.numbers(), seen) for index, right, seen in self._coming]
        return {"right": list(self.right), "seen": list(self.seen), "coming": coming}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there: the next draw knows what it would have known."""
        self.right, self.seen = list(state["right"]), list(state["seen"])
        self._coming = deque((index, OnItsWay(torch.tensor(right)), seen) for index, right, seen in state["coming"])

    def _count(self, all_but: int = 0) -> None:
        while len(self._coming) > all_but:
            index, right, seen = self._coming.popleft()
            self.right[index] += int(right.numbers())
            self.seen[index] += seen

    def _errors(self) -> list[float]:
        return [1 - right / seen if seen else 1.0 for right, seen in zip(self.right, self.seen, strict=True)]
