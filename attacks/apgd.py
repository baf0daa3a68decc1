"""APGD: projected gradient ascent whose step size needs no tuning, for Linf and L2 (arXiv 2003.01690) and for L1 (arXiv 2103.01208).

One loop for every norm. The two controllers are the only code that knows a norm: they propose the next point and, at check-points,
set the step of each example. No operation depends on data, so the attack never makes a GPU wait (a test runs it on `meta`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.losses import cross_entropy
from attacks.projections import project
from attacks.threat import Threat

Model = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

TRAINING_SHARE, EVALUATION_SHARE = 0.05, 0.2  # of the entries that the first L1 step moves


@dataclass(frozen=True)
class Attacked:
    """What a run of APGD found, one row for each of the B examples."""

    x_best: Tensor  # (B, ...) the point of highest loss: what training uses
    x_adv: Tensor  # (B, ...) the last misclassified point, x where there was none: what evaluation uses
    broken: Tensor  # (B,) bool: some step was misclassified
    loss: Tensor  # (B,) the loss at x_best


def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    n_iter: int = 10,
    loss: Loss = cross_entropy,
    delta_init: Tensor | None = None,
    share: float = TRAINING_SHARE,
) -> Attacked:
    """Points (B, ...) of highest loss in the threat's ball and box, after n_iter steps: n_iter + 1 forward and n_iter backward passes.

    x (B, ...) in [0, 1], y (B,). Starts at x, or at the projection of x + delta_init (B, ...). `share` is the part of the entries that
    the first L1 step moves, where it starts at x. The model should be in eval mode. Raises ValueError for n_iter < 1.
    """
    if n_iter < 1:
        raise ValueError(f"the attack needs at least one step, got {n_iter}")
    delta = torch.zeros_like(x) if delta_init is None else project(delta_init, x, threat)
    value, grad, broken = _evaluate(model, x + delta, y, loss, with_grad=True)
    best_delta, best_value, best_grad = delta, value, grad
    adv_delta = torch.where(_rows(broken, x), delta, 0)
    controller = (Sparse if threat.norm == "L1" else Halving)(x, delta, threat, n_iter, value, share)
    previous = delta
    for k in range(n_iter):
        previous, delta = delta, controller.propose(delta, previous, grad, k)
        last_value = value
        value, grad, wrong = _evaluate(model, x + delta, y, loss, with_grad=k + 1 < n_iter)
        broken = broken | wrong
        adv_delta = torch.where(_rows(wrong, x), delta, adv_delta)
        better = value > best_value
        best_value = torch.where(better, value, best_value)
        best_delta = torch.where(_rows(better, x), delta, best_delta)
        best_grad = torch.where(_rows(better, x), grad, best_grad)
        go_back = controller.observe(k, rose=value > last_value, best_value=best_value, best_delta=best_delta)
        if go_back is not None:
            delta = torch.where(_rows(go_back, x), best_delta, delta)
            grad = torch.where(_rows(go_back, x), best_grad, grad)
            value = torch.where(go_back, best_value, value)
    return Attacked(x + best_delta, x + adv_delta, broken, best_value)


def apgd_shrinking(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    n_iter: int = 100,
    loss: Loss = cross_entropy,
    delta_init: Tensor | None = None,
) -> Attacked:
    """APGD in three stages of radius 3, 2 and 1 eps with 30, 30 and 40 % of the steps, each from the projection of the last one's best.

    How L1 is evaluated (arXiv 2103.01208, section 4). Arguments and result as for `apgd`; only the last stage's points count.
    Raises ValueError for fewer than 4 steps.
    """
    first = int(0.3 * n_iter)
    for factor, steps in ((3, first), (2, first), (1, n_iter - 2 * first)):
        result = apgd(model, x, y, Threat(threat.norm, factor * threat.eps), steps, loss, delta_init, EVALUATION_SHARE)
        delta_init = result.x_best - x
    return result


class Halving:
    """Linf and L2: momentum, and a step from 2 eps that is halved where the loss stopped rising (arXiv 2003.01690, algorithm 1)."""

    def __init__(self, x: Tensor, delta: Tensor, threat: Threat, n_iter: int, value: Tensor, share: float) -> None:
        self.x, self.threat = x, threat
        self.step = torch.full_like(value, 2 * threat.eps)
        self.rises = torch.zeros_like(value)
        self.halved = torch.ones_like(value, dtype=torch.bool)
        self.value_at_check = value
        self.interval = max(int(0.22 * n_iter), 1)
        self.shorter, self.shortest = max(int(0.03 * n_iter), 1), max(int(0.06 * n_iter), 1)
        self.next_check = self.interval

    def propose(self, delta: Tensor, previous: Tensor, grad: Tensor, k: int) -> Tensor:
        z = project(delta + _rows(self.step, delta) * self._steepest(grad), self.x, self.threat)
        if k == 0:
            return z
        return project(delta + 0.75 * (z - delta) + 0.25 * (delta - previous), self.x, self.threat)

    def observe(self, k: int, rose: Tensor, best_value: Tensor, best_delta: Tensor) -> Tensor | None:
        self.rises = self.rises + rose
        if k + 1 != self.next_check:
            return None
        stuck = ~self.halved & (best_value <= self.value_at_check)
        self.halved = (self.rises <= 0.75 * self.interval) | stuck
        self.step = torch.where(self.halved, self.step / 2, self.step)
        self.value_at_check = best_value
        self.rises = torch.zeros_like(self.rises)
        self.interval = max(self.interval - self.shorter, self.shortest)
        self.next_check += self.interval
        return self.halved

    def _steepest(self, grad: Tensor) -> Tensor:
        if self.threat.norm == "Linf":
            return grad.sign()
        tiny = torch.finfo(grad.dtype).tiny
        # Scaled first: the squares of a saturated network's gradients underflow.
        scaled = grad / _rows(grad.flatten(1).abs().amax(1).clamp(min=tiny), grad)
        return scaled / _rows(scaled.flatten(1).norm(dim=1).clamp(min=tiny), scaled)


class Sparse:
    """L1: steps that move few entries, as many as the best point's sparsity suggests (arXiv 2103.01208, algorithm 1)."""

    def __init__(self, x: Tensor, delta: Tensor, threat: Threat, n_iter: int, value: Tensor, share: float) -> None:
        self.x, self.threat = x, threat
        self.every = max(int(0.04 * n_iter), 1)
        self.step = torch.full_like(value, threat.eps)
        n = x[0].numel()
        nonzeros = _nonzeros(delta).to(value.dtype)
        started_at_x = nonzeros == 0
        self.nonzeros = torch.where(started_at_x, n, nonzeros)
        self.keep = torch.where(started_at_x, share * n, nonzeros / 1.5)

    def propose(self, delta: Tensor, previous: Tensor, grad: Tensor, k: int) -> Tensor:
        size = grad.flatten(1).abs()
        rank = self.keep.ceil().long().clamp(1, size.shape[1]) - 1
        threshold = size.sort(dim=1, descending=True).values.gather(1, rank[:, None])
        direction = torch.where(size >= threshold, grad.flatten(1).sign(), 0)
        direction = direction / direction.abs().sum(1, keepdim=True).clamp(min=1)
        return project(delta + _rows(self.step, delta) * direction.view(delta.shape), self.x, self.threat)

    def observe(self, k: int, rose: Tensor, best_value: Tensor, best_delta: Tensor) -> Tensor | None:
        if (k + 1) % self.every:
            return None
        nonzeros = _nonzeros(best_delta).to(self.step.dtype)
        sparser = nonzeros < 0.95 * self.nonzeros
        self.step = torch.where(sparser, self.threat.eps, (self.step / 1.5).clamp(min=self.threat.eps / 10))
        self.nonzeros, self.keep = nonzeros, nonzeros / 1.5
        return sparser


def _evaluate(model: Model, x_adv: Tensor, y: Tensor, loss: Loss, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (B,), its gradient (B, ...) or zeros, and which are misclassified (B,). Parameters get no gradient."""
    with torch.set_grad_enabled(with_grad):
        x_adv = x_adv.detach().requires_grad_(with_grad)
        logits = model(x_adv).to(x_adv.dtype)
        values = loss(logits, y)
        # A channels-last network gives a gradient in its own layout; everything here works on plain rows.
        grad = torch.autograd.grad(values.sum(), x_adv)[0].contiguous() if with_grad else torch.zeros_like(x_adv)
    return values.detach(), grad, logits.detach().argmax(1) != y


def _rows(per_example: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1), to meet `like` (B, ...)."""
    return per_example.view(-1, *[1] * (like.dim() - 1))


def _nonzeros(delta: Tensor) -> Tensor:
    return (delta != 0).flatten(1).sum(1)
