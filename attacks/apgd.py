"""APGD: projected gradient ascent with an adaptive step size, for Linf and L2 (arXiv 2003.01690) and for L1 (arXiv 2103.01208).

Each row of the batch is a run of its own with its own step number: evaluation replaces rows that are finished, training moves all rows
together. What differs between norms is in norms.py: projection, direction, and the controller that
adapts each row's step at check-points. No operation depends on values (a test runs it on `meta`), and after the first run of a
kind nothing is copied to the device: the attack never synchronises with a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate

import torch
from torch import Tensor

from .flags import Flag, either, where
from .losses import cross_entropy
from .norms import NORMS, Stages
from .projections import expand_per_example
from .threat import Threat

Model = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

HALF_SCALE = 2**10  # the loss is multiplied by it if the logits are float16
TRAINING_TOP_FRACTION, EVALUATION_TOP_FRACTION = 0.05, 0.2  # of the entries that the first L1 step moves


@dataclass(frozen=True)
class AttackResult:
    """What a run of APGD found, one row for each of the B examples."""

    x_best: Tensor  # (B, ...) the iterate of highest loss: what training uses
    x_adv: Tensor  # (B, ...) the last misclassified iterate, x where there was none: what evaluation uses
    broken: Tensor  # (B,) bool: some iterate was misclassified
    loss: Tensor  # (B,) the loss at x_best


def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    n_iter: int = 10,
    loss: Loss = cross_entropy,
    delta_init: Tensor | None = None,
    top_fraction: float = TRAINING_TOP_FRACTION,
    stages: Stages | None = None,
    radius_scale: Tensor | None = None,
) -> AttackResult:
    """APGD: the iterates of highest loss in n_iter steps (arXiv 2003.01690, algorithm 1; L1: arXiv 2103.01208).

    n_iter + 1 forward and n_iter backward passes per image. x (B, ...) in [0, 1], y (B,), loss(logits, y) -> (B,).

    Starts at x, or at the projection of x + delta_init (B, ...). `top_fraction` is the
    fraction of the input's entries that the first L1 step moves, from any start. `stages`, if given, replace the
    radius and n_iter; only iterates of the last stage count. `radius_scale`, of one element on the images' device, multiplies
    every radius. The model should be in eval mode.
    Raises ValueError for a stage of no steps and for other shapes; on a CPU also for pixels outside [0, 1] and labels that are no class,
    which elsewhere would make the host wait.

    The defaults are those of training. An evaluation starts each run at a random delta_init, has top_fraction=0.2, and in L1 stages of
    3, 2 and 1 eps (norms.shrinking); `robust_accuracy` makes all its runs so.
    """
    x = x.detach()
    _check_inputs(x, y, delta_init)
    run = APGD(threat.norm, stages or [(threat.eps, n_iter)], top_fraction, x, radius_scale)
    rows = run.begin(x, delta_init, together=True)
    broken = torch.zeros_like(y, dtype=torch.bool)
    x_adv = x
    for tick in range(run.ticks):
        x_new = x + rows.delta
        value, grad, wrong = loss_and_grad(model, x_new, y, loss, with_grad=tick + 1 < run.ticks)
        if tick >= run.counts_from:
            broken = broken | wrong
            x_adv = torch.where(expand_per_example(wrong, x), x_new, x_adv)
        run.receive(rows, value, grad)
        if tick + 1 < run.ticks:
            run.move(rows)
    return AttackResult(x + rows.best_delta, x_adv, broken, rows.best_value)


def apgd_each(
    model: Model,
    x: Tensor,
    y: Tensor,
    which: Tensor,
    attacks: Sequence[tuple[Threat, int]],
    radius_scale: Tensor | None = None,
) -> Tensor:
    """x_best (B, ...) of APGD on cross-entropy, for example i in attacks[which[i]], which (B,) int64: the same as `apgd` gives.

    attacks: threat models, each with its number of steps.

    Every threat moves every example, which is cheap, and the network is called once per step on the iterates selected by `which`, so
    that no shape depends on values. If the numbers of steps differ, all examples cost the passes of the longest.
    """
    x = x.detach()
    runs = [APGD(t.norm, [(t.eps, n)], TRAINING_TOP_FRACTION, x, radius_scale) for t, n in attacks]
    all_rows = [run.begin(x, together=True) for run in runs]
    last = max(n for _, n in attacks)
    for tick in range(last + 1):
        x_new = x + select_per_example([rows.delta for rows in all_rows], which)
        value, grad, _ = loss_and_grad(model, x_new, y, cross_entropy, with_grad=tick < last)
        for run, rows in zip(runs, all_rows, strict=True):
            if tick < run.ticks:
                run.receive(rows, value, grad)
            if tick + 1 < run.ticks:
                run.move(rows)
    return x + select_per_example([rows.best_delta for rows in all_rows], which)


def loss_and_grad(model: Model, x_adv: Tensor, y: Tensor, loss: Loss, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (B,); its gradient with respect to x_adv up to a positive factor (B, ...), zeros without with_grad; misclassified (B,) bool.

    Loss and gradient are made `finite`.
    """
    logits, values, grad = forward_backward(model, x_adv, y, loss, with_grad)
    return *finite(values, grad), misclassified(logits, y)


def forward_backward(
    model: Model, x_adv: Tensor, y: Tensor, loss: Loss, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, K), loss (B,) and its gradient up to a positive factor (B, ...), as the network gives them: they may be NaN.

    The gradient is 0 without with_grad, and where the loss does not depend on x_adv through autograd. Raises ValueError for other logits.
    """
    with torch.set_grad_enabled(with_grad):
        x_adv = x_adv.detach().requires_grad_(with_grad)
        answer = model(x_adv.clone())  # a network may change its input in place
        check_logits(answer, len(x_adv))
        logits = answer.to(x_adv.dtype)
        values = loss(logits, y)
        # In float16 small gradients would vanish; only the direction counts, so they need not be scaled back.
        total = values.sum() * HALF_SCALE if answer.dtype == torch.float16 else values.sum()
        grad = torch.autograd.grad(total, x_adv, allow_unused=True)[0] if total.requires_grad else None
    # A channels-last network gives a gradient in its own layout; everything here works on plain rows.
    grad = torch.zeros_like(x_adv) if grad is None else grad.contiguous()
    return logits.detach(), values.detach(), grad.detach()


def finite(values: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient for a search: a loss of NaN is the lowest, and entries of the gradient that are not finite are 0.

    NaN compares as false, so as a best loss it would stay for ever; one NaN in a gradient would spoil its norm, and so every entry.
    """
    return values.nan_to_num(float("-inf"), float("inf"), float("-inf")), grad.nan_to_num(0, 0, 0)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """(B,) bool: the largest of the logits (B, K) is not the label's, or is NaN or infinite, which is no answer."""
    top = logits.max(1)  # NaN where there is one
    answer: Tensor = top.indices + 0 * top.values.float()  # NaN if the largest is not finite: equal to no label
    return answer != y


def check_logits(answer: Tensor, n: int, num_classes: int | None = None) -> None:
    """Raises ValueError unless a network's answer to n images is a tensor of real logits (n, num_classes), or (n, any number > 0)."""
    if not isinstance(answer, Tensor):
        raise ValueError(f"the network must give a tensor of logits, it gave a {type(answer).__name__}")
    expected = (n, num_classes or answer.shape[-1] if answer.dim() else 0)
    if answer.shape != expected or not answer.shape[1] or answer.is_complex():
        dtype = f" of type {answer.dtype}" if answer.is_complex() else ""
        classes = num_classes or "number of classes"
        raise ValueError(
            f"the network must give real logits of shape ({n}, {classes}) for {n} images, it gave {tuple(answer.shape)}{dtype}"
        )


def _check_inputs(x: Tensor, y: Tensor, delta_init: Tensor | None) -> None:
    """Raises ValueError for what is no images (B, ...), labels (B,) and start (B, ...); values are looked at on a CPU alone."""
    if x.dim() < 2 or y.shape != x.shape[:1]:
        raise ValueError(f"images (B, ...) and labels (B,) are needed, got {tuple(x.shape)} and {tuple(y.shape)}")
    if not x.is_floating_point() or y.dtype != torch.int64:
        raise ValueError(f"images must be floats in [0, 1] and labels int64, got {x.dtype} and {y.dtype}")
    if delta_init is not None and delta_init.shape != x.shape:
        raise ValueError(f"delta_init must have the images' shape {tuple(x.shape)}, got {tuple(delta_init.shape)}")
    if x.device.type == "cpu" and not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(
            "pixels must be in [0, 1]; a network that takes normalised images has to normalise them itself"
        )
    if y.device.type == "cpu" and bool((y < 0).any()):
        raise ValueError(f"labels must be whole numbers from 0, got {int(y.min())}")


@dataclass
class APGDState:
    """State of B runs. Radii and check-points by iterate number (`tick`) are in APGD's tables, the same for all rows."""

    x: Tensor  # (B, ...) the clean images
    delta: Tensor  # (B, ...) the next iterate to evaluate, minus x
    previous: Tensor  # (B, ...) the iterate before it
    grad: Tensor  # (B, ...) gradient at the iterate evaluated last
    value: Tensor  # (B,) loss there
    best_delta: Tensor  # (B, ...) the iterate of highest loss in this stage
    best_grad: Tensor  # (B, ...)
    best_value: Tensor  # (B,)
    tick: Tensor | int  # number of iterates evaluated so far, (B,) int64, or one for rows that move together
    step: Tensor  # (B,) the step size
    rises: Tensor  # (B,) HalvingController: steps since the check-point that raised the loss
    value_at_check: (
        Tensor  # (B,) HalvingController: best loss at the last check-point, -inf if the step was halved there
    )
    nonzeros: Tensor  # (B,) SparseController: entries of best_delta that are not 0, at the last check-point
    keep: Tensor  # (B,) SparseController: how many entries a step moves

    def pick(self, index: Tensor) -> APGDState:
        """The rows `index` (positions or bool)."""
        return APGDState(*(value[index] for value in vars(self).values()))

    def join(self, other: APGDState) -> APGDState:
        """These rows, then the other's."""
        return APGDState(*map(torch.cat, zip(vars(self).values(), vars(other).values(), strict=True)))


class APGD:
    """One kind of run: a norm and stages (radius, steps), each started at the projection of the previous stage's best iterate.

    A run evaluates `ticks` iterates: the start of each stage and one per step. Those from number `counts_from` on are in the last stage.
    `like`: any tensor with device and type of the images. `radius_scale`, of one element, multiplies every radius.
    Raises ValueError for a stage of no steps.
    """

    def __init__(
        self, norm: str, stages: Stages, top_fraction: float, like: Tensor, radius_scale: Tensor | None = None
    ) -> None:
        if min(steps for _, steps in stages) < 1:
            raise ValueError(f"each stage of the attack needs at least one step, got {[n for _, n in stages]}")
        self.norm = NORMS[norm]
        self.controller = self.norm.controller(top_fraction)
        dtype = torch.promote_types(like.dtype, torch.float32)  # radii in half precision would leave the ball
        hashable = tuple((radius, steps) for radius, steps in stages)
        self.tables = _Tables.of(self.controller.check_points, hashable, like.device, dtype)
        if radius_scale is not None:
            self.tables = replace(self.tables, eps=self.tables.eps * radius_scale)
        self.ticks = len(self.tables.eps)
        self.counts_from = self.ticks - stages[-1][1] - 1
        self.stage_starts = [0, *accumulate(steps + 1 for _, steps in stages[:-1])]

    def begin(self, x: Tensor, delta_init: Tensor | None = None, together: bool = False) -> APGDState:
        """Rows whose first iterate is x (B, ...), or the projection of x + delta_init.

        `together`: they make all steps together, so that the host knows their step number, and a GPU has fewer kernels to launch.
        """
        flat, zero = torch.zeros_like(x), x.new_zeros(len(x))
        tick = 0 if together else zero.to(torch.int64)
        start = flat if delta_init is None else self.norm.project(delta_init, x, self.tables.at(0, len(x))[0])
        return APGDState(x, start, start, flat, zero, start, flat, zero, tick, zero, zero, zero, zero, zero)

    def receive(self, rows: APGDState, value: Tensor, grad: Tensor) -> None:
        """Record loss (B,) and gradient (B, ...) at rows.delta; at check-points adapt the step size and return to the best iterate."""
        eps, starts, interval = self.tables.at(rows.tick, len(value))
        better = either(starts, value > rows.best_value)
        rows.best_value = where(better, value, rows.best_value)
        rows.best_delta = where(better, rows.delta, rows.best_delta)
        rows.best_grad = where(better, grad, rows.best_grad)
        back = self.controller.adapt(rows, value, starts, interval, eps)
        rows.delta = where(back, rows.best_delta, rows.delta)
        rows.grad = where(back, rows.best_grad, grad)
        rows.value = where(back, rows.best_value, value)
        rows.tick = rows.tick + 1

    def move(self, rows: APGDState) -> None:
        """Set rows.delta to the next iterate: one ascent step, or the start of the next stage."""
        eps, starts, _ = self.tables.at(rows.tick, len(rows.x))
        step = rows.delta + expand_per_example(rows.step, rows.x) * self.norm.steepest(rows.grad, rows.keep)
        new = self.norm.project(where(starts, rows.best_delta, step), rows.x, eps)
        if self.controller.momentum:
            # 0.75 (new - delta) + 0.25 (delta - previous) from delta; in a stage's first step, with no step before, new alone.
            alone = either(starts, self.tables.at(rows.tick - 1, len(rows.x))[1])
            blend = where(alone, new, torch.lerp(new, 2 * rows.delta - rows.previous, 0.25))
            new = self.norm.project(blend, rows.x, eps)
        rows.previous, rows.delta = rows.delta, new


@dataclass(frozen=True)
class _Tables:
    """A run's plan: for each tick the radius; is it a stage's start; the steps since the last check-point if it is one, else 0.

    On the device for rows whose ticks differ, the last two also on the host for rows that move together.
    """

    eps: Tensor
    starts: Tensor
    interval: Tensor
    known: tuple[tuple[bool, int], ...]

    @classmethod
    @lru_cache
    def of(
        cls, check_points: Callable[[int], list[int]], stages: Stages, device: torch.device, dtype: torch.dtype
    ) -> _Tables:
        """Tables of these stages, copied to the device once."""
        eps = [radius for radius, steps in stages for _ in range(steps + 1)]
        starts = [step == 0 for _, steps in stages for step in range(steps + 1)]
        interval = [since for _, steps in stages for since in (0, *check_points(steps))]
        table = partial(torch.tensor, device=device)
        known = tuple(zip(starts, interval, strict=True))
        return cls(table(eps, dtype=dtype), table(starts), table(interval), known)

    def at(self, tick: Tensor | int, n: int) -> tuple[Tensor, Flag, Tensor | int]:
        """Radius (n,), start and interval of n rows."""
        if isinstance(tick, Tensor):
            return self.eps[tick], self.starts[tick], self.interval[tick]
        return self.eps[tick].expand(n), *self.known[tick]


def select_per_example(options: Sequence[Tensor], which: Tensor) -> Tensor:
    """Row i of options[which[i]], for all i: options (B, ...) each, which (B,) int64."""
    chosen = options[0]
    for index, option in enumerate(options[1:], 1):
        chosen = torch.where(expand_per_example(which == index, option), option, chosen)
    return chosen
