"""Step sizes that adapt themselves: what APGD does at its check-points, for each row of the batch.

A norm names one of these classes. A new one is a subclass of StepController; what it has to remember of a row is in APGDState.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .apgd import APGDState


class StepController:
    """Sets each row's step size, and says which rows go back to their best iterate."""

    momentum: ClassVar[bool]

    def __init__(self, top_fraction: float) -> None:
        self.top_fraction = top_fraction  # of the entries that the first step moves, where directions are sparse

    @staticmethod
    def check_points(n_iter: int) -> list[int]:
        """For each of n_iter steps the number of steps since the last check-point where it is one, else 0."""
        raise NotImplementedError

    def adapt(self, rows: APGDState, rose: Tensor, starts: Tensor, interval: Tensor, eps: Tensor) -> Tensor:
        """Set rows.step (B,) and what goes with it after a loss was taken in; (B,) bool: go back to the best iterate.

        rose (B,): the loss is above the last one's; starts (B,): a stage starts here; interval (B,): the steps since the last
        check-point if this is one, else 0; eps (B,): the stage's radius.
        """
        raise NotImplementedError


class HalvingController(StepController):
    """Linf and L2: momentum, and a step from 2 eps that is halved where the loss stopped rising (arXiv 2003.01690, algorithm 1)."""

    momentum = True

    @staticmethod
    def check_points(n_iter: int) -> list[int]:
        interval, shorter, shortest = (max(int(part * n_iter), 1) for part in (0.22, 0.03, 0.06))
        checks, since = [], 0
        for _ in range(n_iter):
            since += 1
            checks.append(since if since == interval else 0)
            if since == interval:
                interval, since = max(interval - shorter, shortest), 0
        return checks

    def adapt(self, rows: APGDState, rose: Tensor, starts: Tensor, interval: Tensor, eps: Tensor) -> Tensor:
        rises = rows.rises + rose
        stuck = ~rows.halved & (rows.best_value <= rows.value_at_check)
        check = interval > 0
        halve = check & ((rises <= 0.75 * interval) | stuck)
        rows.step = torch.where(starts, 2 * eps, torch.where(halve, rows.step / 2, rows.step))
        rows.halved = torch.where(check, halve, rows.halved | starts)
        rows.value_at_check = torch.where(check | starts, rows.best_value, rows.value_at_check)
        rows.rises = torch.where(check | starts, 0, rises)
        return halve


class SparseController(StepController):
    """L1: no momentum; steps that move few entries, as many as the best iterate's sparsity suggests (arXiv 2103.01208, algorithm 1)."""

    momentum = False

    @staticmethod
    def check_points(n_iter: int) -> list[int]:
        every = max(int(0.04 * n_iter), 1)
        return [0 if (k + 1) % every else every for k in range(n_iter)]

    def adapt(self, rows: APGDState, rose: Tensor, starts: Tensor, interval: Tensor, eps: Tensor) -> Tensor:
        check = interval > 0
        nonzeros = (rows.best_delta != 0).flatten(1).sum(1).to(rows.step.dtype)
        n = rows.x[0].numel()
        sparser = check & (nonzeros < 0.95 * rows.nonzeros)  # then a new start: step eps, from the best iterate
        fresh = (rows.tick == 0) | (starts & (nonzeros == 0))  # a run's start, however dense, or the clean image
        smaller = torch.maximum(rows.step / 1.5, eps / 10)
        rows.step = torch.where(starts | sparser, eps, torch.where(check, smaller, rows.step))
        rows.keep = torch.where(fresh, self.top_fraction * n, torch.where(check | starts, nonzeros / 1.5, rows.keep))
        rows.nonzeros = torch.where(fresh, n, torch.where(check | starts, nonzeros, rows.nonzeros))
        return sparser
