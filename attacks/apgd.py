"""APGD: projected gradient ascent whose step size needs no tuning, for Linf and L2 (arXiv 2003.01690) and for L1 (arXiv 2103.01208).

Many runs side by side, a row each. A row's step number is its own, so that evaluation can take finished rows out and put new ones
in; training keeps all rows in step. The two controllers are the only code that knows a norm: they say where to go, and at
check-points adapt the step of each row. No operation depends on data (a test runs it on `meta`), and after a first run of its kind nothing
is copied to the device, so the attack never makes a GPU wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from attacks.losses import cross_entropy
from attacks.projections import project
from attacks.threat import Norm, Threat

Model = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Stages = Sequence[tuple[float, int]]  # (radius, steps) of each stage of a run

HALF_SCALE = 2**10  # of the loss where the network answers in float16
TRAINING_SHARE, EVALUATION_SHARE = 0.05, 0.2  # of the entries that the first L1 step moves


@dataclass(frozen=True)
class AttackResult:
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
    stages: Stages | None = None,
) -> AttackResult:
    """Points (B, ...) of highest loss in the threat's ball and box, after n_iter steps: n_iter + 1 forward and n_iter backward passes.

    x (B, ...) in [0, 1], y (B,). Starts at x, or at the projection of x + delta_init (B, ...). `share` is the part of the entries that
    the first L1 step moves, where it starts at x. `stages`, if given, replace the radius and n_iter; only the last stage's points count.
    The model should be in eval mode. Raises ValueError for a stage of no steps.
    """
    x = x.detach()
    run = APGD(threat.norm, stages or [(threat.eps, n_iter)], share, x.device)
    rows = run.begin(x, delta_init)
    broken = torch.zeros_like(y, dtype=torch.bool)
    x_adv = x
    for tick in range(run.ticks):
        x_new = x + rows.delta
        value, grad, wrong = loss_and_grad(model, x_new, y, loss, with_grad=tick + 1 < run.ticks)
        if tick >= run.counts_from:
            broken = broken | wrong
            x_adv = torch.where(expand_per_example(wrong, x), x_new, x_adv)
        run.observe(rows, value, grad)
        if tick + 1 < run.ticks:
            run.move(rows)
    return AttackResult(x + rows.best_delta, x_adv, broken, rows.best_value)


def apgd_each(
    model: Model, x: Tensor, y: Tensor, threats: Sequence[Threat], n_iters: Sequence[int], which: Tensor
) -> Tensor:
    """Points of highest loss (B, ...), that of image i in the ball of threats[which[i]], which (B,) int64, all in one pass a step.

    The points are those of `apgd`. Every threat's run moves every image, which costs little, and the network sees the ones that count,
    so that no shape depends on `which`. If n_iters differ, the passes are those of the longest run.
    """
    x = x.detach()
    runs = [APGD(t.norm, [(t.eps, n)], TRAINING_SHARE, x.device) for t, n in zip(threats, n_iters, strict=True)]
    all_rows = [run.begin(x) for run in runs]
    last = max(n_iters)
    for tick in range(last + 1):
        x_new = x + select_per_example([rows.delta for rows in all_rows], which)
        value, grad, _ = loss_and_grad(model, x_new, y, cross_entropy, with_grad=tick < last)
        for run, rows in zip(runs, all_rows, strict=True):
            if tick < run.ticks:
                run.observe(rows, value, grad)
            if tick + 1 < run.ticks:
                run.move(rows)
    return x + select_per_example([rows.best_delta for rows in all_rows], which)


def shrinking(eps: float, n_iter: int) -> Stages:
    """Three stages of radius 3, 2 and 1 eps with 30, 30 and 40 % of the steps: how L1 is evaluated (arXiv 2103.01208, section 4)."""
    first = int(0.3 * n_iter)
    return [(3 * eps, first), (2 * eps, first), (eps, n_iter - 2 * first)]


def loss_and_grad(model: Model, x_adv: Tensor, y: Tensor, loss: Loss, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (B,), the direction of its gradient (B, ...) or zeros, and which are misclassified (B,). Parameters get no gradient."""
    with torch.set_grad_enabled(with_grad):
        x_adv = x_adv.detach().requires_grad_(with_grad)
        answer = model(x_adv)
        logits = answer.to(x_adv.dtype)
        values = loss(logits, y)
        # In float16 small gradients would vanish; only the direction counts, so they need not be scaled back.
        scale = HALF_SCALE if answer.dtype == torch.float16 else 1
        # A channels-last network gives a gradient in its own layout; everything here works on plain rows.
        grad = (
            torch.autograd.grad(scale * values.sum(), x_adv)[0].contiguous() if with_grad else torch.zeros_like(x_adv)
        )
    return values.detach(), grad, logits.detach().argmax(1) != y


@dataclass
class APGDState:
    """Where B runs are. The radius and what happens at a tick are in APGD's tables, common to all."""

    x: Tensor  # (B, ...) the clean images
    delta: Tensor  # (B, ...) the point that the network judges next, minus x
    previous: Tensor  # (B, ...) the point before it
    grad: Tensor  # (B, ...) at the point judged last
    value: Tensor  # (B,) loss there
    best_delta: Tensor  # (B, ...) the point of highest loss in this stage
    best_grad: Tensor  # (B, ...)
    best_value: Tensor  # (B,)
    tick: Tensor  # (B,) int64: how many points of this run were judged
    step: Tensor  # (B,) the step size
    rises: Tensor  # (B,) HalvingController: steps since the check-point that raised the loss
    halved: Tensor  # (B,) bool, HalvingController: the step was halved at the last check-point
    value_at_check: Tensor  # (B,) HalvingController: best loss at the last check-point
    nonzeros: Tensor  # (B,) SparseController: entries of best_delta that are not 0, at the last check-point
    keep: Tensor  # (B,) SparseController: how many entries a step moves

    def __len__(self) -> int:
        return len(self.x)

    def pick(self, index: Tensor) -> APGDState:
        """The rows `index` (positions or bool)."""
        return APGDState(*(getattr(self, field.name)[index] for field in fields(self)))

    def join(self, other: APGDState) -> APGDState:
        """These rows, then the other's."""
        return APGDState(
            *(torch.cat([getattr(self, field.name), getattr(other, field.name)]) for field in fields(self))
        )


class APGD:
    """One kind of run: a norm and stages (radius, steps), each from the projection of the last one's best point.

    A run judges `ticks` points: for each stage its start and one a step. Points from tick `counts_from` on are in the last radius.
    Raises ValueError for a stage of no steps.
    """

    def __init__(self, norm: Norm, stages: Stages, share: float, device: torch.device) -> None:
        if min(steps for _, steps in stages) < 1:
            raise ValueError(f"each stage of the attack needs at least one step, got {[n for _, n in stages]}")
        self.norm, self.controller = norm, (SparseController if norm == "L1" else HalvingController)(norm, share)
        self.eps, self.starts, self.interval = _tables(norm, tuple((radius, steps) for radius, steps in stages), device)
        self.ticks = len(self.eps)
        self.counts_from = self.ticks - stages[-1][1] - 1

    def begin(self, x: Tensor, delta_init: Tensor | None = None) -> APGDState:
        """APGDState about to loss_and_grad their first point: x (B, ...), or the projection of x + delta_init."""
        zero = x.new_zeros(len(x))
        start = torch.zeros_like(x) if delta_init is None else project(delta_init, x, self.norm, zero + self.eps[0])
        ticks = torch.zeros_like(zero, dtype=torch.int64)
        images = start, start, torch.zeros_like(x)
        best = start, torch.zeros_like(x), zero
        return APGDState(
            x, *images, zero, *best, ticks, zero, zero, torch.zeros_like(zero, dtype=torch.bool), zero, zero, zero
        )

    def observe(self, rows: APGDState, value: Tensor, grad: Tensor) -> None:
        """Take the loss (B,) and gradient (B, ...) at rows.delta; adapt steps, and go back to the best point, at check-points."""
        starts = self.starts[rows.tick]
        rose = (value > rows.value) & ~starts
        better = (value > rows.best_value) | starts
        rows.best_value = torch.where(better, value, rows.best_value)
        rows.best_delta = torch.where(expand_per_example(better, grad), rows.delta, rows.best_delta)
        rows.best_grad = torch.where(expand_per_example(better, grad), grad, rows.best_grad)
        back = self.controller.adapt(rows, rose, starts, self.interval[rows.tick], self.eps[rows.tick])
        rows.delta = torch.where(expand_per_example(back, grad), rows.best_delta, rows.delta)
        rows.grad = torch.where(expand_per_example(back, grad), rows.best_grad, grad)
        rows.value = torch.where(back, rows.best_value, value)
        rows.tick = rows.tick + 1

    def move(self, rows: APGDState) -> None:
        """To the point that the network judges next: a step on, or the start of the next stage."""
        eps, starts = self.eps[rows.tick], self.starts[rows.tick]
        step = rows.delta + expand_per_example(rows.step, rows.x) * self.controller.direction(rows)
        new = project(torch.where(expand_per_example(starts, rows.x), rows.best_delta, step), rows.x, self.norm, eps)
        if self.controller.momentum:
            # 0.75 (new - delta) + 0.25 (delta - previous) from delta; in a stage's first step, with no step before, new alone.
            alone = starts | self.starts[rows.tick - 1]
            share = expand_per_example(torch.where(alone, 0, 0.25).to(new.dtype), new)
            blend = torch.lerp(new, 2 * rows.delta - rows.previous, share)
            new = project(blend, rows.x, self.norm, eps)
        rows.previous, rows.delta = rows.delta, new


@lru_cache
def _tables(norm: Norm, stages: tuple[tuple[float, int], ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each tick the radius; is it a stage's start; the steps since the last check-point if it is one, else 0. On the device once."""
    eps, starts, interval = [], [], []
    for radius, steps in stages:
        eps += [radius] * (steps + 1)
        starts += [True] + [False] * steps
        interval += [0, *(SparseController if norm == "L1" else HalvingController).check_points(steps)]
    return torch.tensor(eps, device=device), torch.tensor(starts, device=device), torch.tensor(interval, device=device)


class HalvingController:
    """Linf and L2: momentum, and a step from 2 eps that is halved where the loss stopped rising (arXiv 2003.01690, algorithm 1)."""

    momentum = True

    def __init__(self, norm: Norm, share: float) -> None:
        self.norm = norm

    @staticmethod
    def check_points(n_iter: int) -> list[int]:
        """For each step the number of steps since the last check-point where it is one, else 0."""
        interval, shorter, shortest = (max(int(part * n_iter), 1) for part in (0.22, 0.03, 0.06))
        checks, since = [], 0
        for _ in range(n_iter):
            since += 1
            checks.append(since if since == interval else 0)
            if since == interval:
                interval, since = max(interval - shorter, shortest), 0
        return checks

    def direction(self, rows: APGDState) -> Tensor:
        """Of steepest ascent, length 1 in the norm."""
        return steepest(rows.grad, self.norm)

    def adapt(self, rows: APGDState, rose: Tensor, starts: Tensor, interval: Tensor, eps: Tensor) -> Tensor:
        """Set the step where a stage starts, halve it where a check-point says so: there, and (B,) bool, go back."""
        rises = rows.rises + rose
        stuck = ~rows.halved & (rows.best_value <= rows.value_at_check)
        check = interval > 0
        halve = check & ((rises <= 0.75 * interval) | stuck)
        rows.step = torch.where(starts, 2 * eps, torch.where(halve, rows.step / 2, rows.step))
        rows.halved = torch.where(check, halve, rows.halved | starts)
        rows.value_at_check = torch.where(check | starts, rows.best_value, rows.value_at_check)
        rows.rises = torch.where(check | starts, 0, rises)
        return halve


class SparseController:
    """L1: steps that move few entries, as many as the best point's sparsity suggests (arXiv 2103.01208, algorithm 1)."""

    momentum = False

    def __init__(self, norm: Norm, share: float) -> None:
        self.share = share

    @staticmethod
    def check_points(n_iter: int) -> list[int]:
        """For each step the number of steps since the last check-point where it is one, else 0."""
        every = max(int(0.04 * n_iter), 1)
        return [0 if (k + 1) % every else every for k in range(n_iter)]

    def direction(self, rows: APGDState) -> Tensor:
        """Along the largest entries of the gradient, length 1 in L1."""
        return steepest(rows.grad, "L1", rows.keep)

    def adapt(self, rows: APGDState, rose: Tensor, starts: Tensor, interval: Tensor, eps: Tensor) -> Tensor:
        """At a check-point start anew (eps, from the best point: there True, (B,)) where that became sparser, else a smaller step."""
        check = interval > 0
        nonzeros = (rows.best_delta != 0).flatten(1).sum(1).to(rows.step.dtype)
        n = rows.x[0].numel()
        sparser = check & (nonzeros < 0.95 * rows.nonzeros)
        fresh = (rows.tick == 0) | (starts & (nonzeros == 0))  # a run's start, however dense, or the clean point
        smaller = torch.maximum(rows.step / 1.5, eps / 10)
        rows.step = torch.where(starts | sparser, eps, torch.where(check, smaller, rows.step))
        rows.keep = torch.where(fresh, self.share * n, torch.where(check | starts, nonzeros / 1.5, rows.keep))
        rows.nonzeros = torch.where(fresh, n, torch.where(check | starts, nonzeros, rows.nonzeros))
        return sparser


def steepest(grad: Tensor, norm: Norm, keep: Tensor | None = None) -> Tensor:
    """Direction of steepest ascent (B, ...), length 1 in the norm; in L1 along each row's `keep` (B,) largest entries, rounded up."""
    if norm == "Linf":
        return grad.sign()
    if norm == "L1":
        size = grad.flatten(1).abs()
        assert keep is not None
        count = keep.ceil().clamp(1, size.shape[1])[:, None]
        signs = grad.flatten(1).sign() * (size >= kth_largest(size, count))
        return (signs / signs.abs().sum(1, keepdim=True).clamp(min=1)).view(grad.shape)
    tiny = torch.finfo(grad.dtype).tiny
    # Scaled first: the squares of a saturated network's gradients underflow.
    scaled = grad / expand_per_example(grad.flatten(1).abs().amax(1).clamp(min=tiny), grad)
    return scaled / expand_per_example(scaled.flatten(1).norm(dim=1).clamp(min=tiny), scaled)


def kth_largest(size: Tensor, k: Tensor) -> Tensor:
    """The k-th (B, 1) largest, from 1, of each row of size (B, N), all >= 0: (B, 1).

    Bit by bit from the highest: floats are in the order of their bits. A sort costs many times as much (docs/log.md); topk needs one
    k for all rows.
    """
    whole, bits = (torch.int64, 63) if size.dtype == torch.float64 else (torch.int32, 31)
    found = torch.zeros_like(size[:, :1]).view(whole)
    chosen = torch.empty_like(size)
    for bit in reversed(range(bits)):
        more = found + 2**bit
        enough = torch.ge(size, more.view(size.dtype), out=chosen).sum(1, keepdim=True) >= k
        found = torch.where(enough, more, found)
    return found.view(size.dtype)


def select_per_example(options: Sequence[Tensor], which: Tensor) -> Tensor:
    """Row i of options[which[i]], for all i: options (B, ...) each, which (B,) int64."""
    chosen = options[0]
    for index, option in enumerate(options):
        chosen = torch.where(expand_per_example(which == index, option), option, chosen)
    return chosen


def expand_per_example(per_example: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1), to meet `like` (B, ...)."""
    return per_example.view(-1, *[1] * (like.dim() - 1))
