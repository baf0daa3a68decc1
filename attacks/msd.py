"""MSD: multi steepest descent over several norms in one run (Maini et al., ICML 2020, arXiv 1909.04068, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .apgd import Model, loss_and_grad, select_per_example
from .losses import cross_entropy
from .projections import expand_per_example
from .threat import Threat

# Of the entries, at least one, that a sparse (L1) step moves: highest loss on CIFAR-10 (docs/log.md).
TOP_FRACTION = 0.01
STEPS_TO_CROSS = 5  # a threat's step is eps * this / n_iter: eps / 10 in 50 steps, as published for CIFAR-10


def msd(
    model: Model,
    x: Tensor,
    y: Tensor,
    threats: Sequence[Threat],
    n_iter: int,
    radius_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x_adv (B, ...) of highest loss that a run from x meets, and the threat (B,) int64 whose step led there and whose ball holds it.

    Each step tries every threat's steepest one, projected on that threat's ball and the box, and keeps the one of highest loss:
    n_iter backward and n_iter * (1 + number of threats) forward passes. The model should be in eval mode. `radius_scale`, of one element,
    multiplies every radius.
    """
    x = x.detach()
    delta, best = torch.zeros_like(x), torch.zeros_like(x)
    threat = torch.zeros_like(y)
    value, grad, _ = loss_and_grad(model, x, y, cross_entropy, with_grad=True)
    best_value = value
    for step in range(n_iter):
        tried = [_step(delta, grad, x, each, STEPS_TO_CROSS / n_iter, radius_scale) for each in threats]
        last = step + 1 == n_iter
        values = torch.stack([loss_and_grad(model, x + new, y, cross_entropy, with_grad=False)[0] for new in tried])
        value, chosen = values.max(0)
        delta = select_per_example(tried, chosen)
        better = value > best_value
        best_value = torch.where(better, value, best_value)
        best = torch.where(expand_per_example(better, x), delta, best)
        threat = torch.where(better, chosen, threat)
        if not last:
            grad = loss_and_grad(model, x + delta, y, cross_entropy, with_grad=True)[1]
    return x + best, threat


def _step(delta: Tensor, grad: Tensor, x: Tensor, threat: Threat, length: float, scale: Tensor | None) -> Tensor:
    """delta after the threat's steepest step of length * eps among the entries that the box lets move, in ball and box."""
    eps = torch.full((len(x),), threat.eps, device=x.device, dtype=x.dtype)
    size: Tensor | float = length * threat.eps
    if scale is not None:
        eps, size = eps * scale, size * scale
    keep = torch.full_like(eps, TOP_FRACTION * x[0].numel())
    at_edge = torch.where(grad > 0, x + delta >= 1, x + delta <= 0)
    new = delta + size * threat.spec.steepest(torch.where(at_edge, 0, grad), keep)
    return threat.spec.project(new, x, eps)
