"""All that the attacks know of a norm, in one object each: a new norm is a NormSpec given to `register_norm`, and nothing else.

A norm is its projection (projections.py), its direction of steepest ascent, the rule that adapts APGD's step, and its random start.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .flags import Flag, both, either, where
from .projections import expand_per_example, project_l1, project_l2, project_linf, sorts

if TYPE_CHECKING:
    from .apgd import APGDState

Stages = Sequence[tuple[float, int]]  # (radius, steps) of each stage of a run


def steepest_linf(grad: Tensor, keep: Tensor) -> Tensor:
    """The gradient's sign."""
    return grad.sign()


def steepest_l2(grad: Tensor, keep: Tensor) -> Tensor:
    """The gradient over its L2 norm; 0 where it is 0."""
    tiny = torch.finfo(grad.dtype).tiny
    # Scaled first: the squares of a saturated network's gradients underflow.
    scaled = grad / expand_per_example(grad.flatten(1).abs().amax(1).clamp(min=tiny), grad)
    return scaled / expand_per_example(scaled.flatten(1).norm(dim=1).clamp(min=tiny), scaled)


def steepest_l1(grad: Tensor, keep: Tensor) -> Tensor:
    """The signs of each example's `keep` (B,) largest entries (rounded up), over their number (arXiv 2103.01208, section 4)."""
    size = grad.flatten(1).abs()
    count = keep.ceil().clamp(1, size.shape[1])[:, None]
    signs = grad.flatten(1).sign() * (size >= kth_largest(size, count))
    return (signs / signs.abs().sum(1, keepdim=True).clamp(min=1)).view(grad.shape)


def kth_largest(size: Tensor, k: Tensor) -> Tensor:
    """The k-th (B, 1) largest, from 1, of each row of size (B, N), all >= 0: (B, 1). (topk needs one k for all rows.)"""
    return kth_by_sort(size, k) if sorts(size) else kth_by_bits(size, k)


def kth_by_sort(size: Tensor, k: Tensor) -> Tensor:
    """`kth_largest` where a sort is quick."""
    return size.sort(1, descending=True).values.gather(1, k.long() - 1)


def kth_by_bits(size: Tensor, k: Tensor) -> Tensor:
    """`kth_largest` on CPUs: bit by bit from the highest, as floats are in the order of their bits."""
    whole, bits = (torch.int64, 63) if size.dtype == torch.float64 else (torch.int32, 31)
    found = torch.zeros_like(size[:, :1]).view(whole)
    chosen = torch.empty_like(size)
    for bit in reversed(range(bits)):
        more = found + 2**bit
        enough = torch.ge(size, more.view(size.dtype), out=chosen).sum(1, keepdim=True) >= k
        found = torch.where(enough, more, found)
    return found.view(size.dtype)


class StepController:
    """APGD's step-size rule, applied per example at check-points. What a subclass keeps per example is a field of APGDState."""

    momentum: ClassVar[bool]

    def __init__(self, top_fraction: float) -> None:
        self.top_fraction = top_fraction  # of the entries that the first step moves, where directions are sparse

    @staticmethod
    def check_points(n_iter: int) -> list[int]:
        """n_iter numbers: at a step that is a check-point the steps since the previous one, elsewhere 0."""
        raise NotImplementedError

    def adapt(self, rows: APGDState, value: Tensor, starts: Flag, interval: Tensor | int, eps: Tensor) -> Flag:
        """Update rows.step (B,) and this controller's fields; which examples return to their best iterate.

        Called after each evaluated iterate. value (B,): its loss; starts: it starts a stage; interval, (B,) or one for all rows: length
        of the interval that ends here if this is a check-point, else 0; eps (B,): the stage's radius.
        """
        raise NotImplementedError


class HalvingController(StepController):
    """Linf and L2: momentum, initial step size 2 eps, halved at check-points without progress (arXiv 2003.01690, algorithm 1)."""

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

    def adapt(self, rows: APGDState, value: Tensor, starts: Flag, interval: Tensor | int, eps: Tensor) -> Flag:
        check = interval > 0
        rises = rows.rises + (value > rows.value)
        changes = either(check, starts)
        if changes is False:
            rows.rises = rises
            return False
        halve = both(check, (rises <= 0.75 * interval) | (rows.best_value <= rows.value_at_check))
        rows.step = where(starts, 2 * eps, where(halve, rows.step / 2, rows.step))
        # Nothing is at most -inf: after a start and after a halving, the next check-point counts rises alone.
        new = where(either(starts, halve), -math.inf, rows.best_value)
        rows.value_at_check = where(changes, new, rows.value_at_check)
        rows.rises = where(changes, 0, rises)
        return halve


class SparseController(StepController):
    """L1-APGD: no momentum, step size in [eps / 10, eps], sparse steps, as many entries as the best iterate suggests (arXiv 2103.01208)."""

    momentum = False

    @staticmethod
    def check_points(n_iter: int) -> list[int]:
        every = max(int(0.04 * n_iter), 1)
        return [0 if (k + 1) % every else every for k in range(n_iter)]

    def adapt(self, rows: APGDState, value: Tensor, starts: Flag, interval: Tensor | int, eps: Tensor) -> Flag:
        check = interval > 0
        changes = either(check, starts)
        if changes is False:
            return False
        nonzeros = torch.linalg.vector_norm(rows.best_delta.flatten(1), 0, 1)
        sparser = both(check, nonzeros < 0.95 * rows.nonzeros)  # then a new start: step eps, from the best iterate
        smaller = torch.maximum(rows.step / 1.5, eps / 10)
        rows.step = where(either(starts, sparser), eps, where(check, smaller, rows.step))
        rows.keep = where(changes, nonzeros / 1.5, rows.keep)
        rows.nonzeros = where(changes, nonzeros, rows.nonzeros)
        if starts is not False:  # a run's start, however dense, and the clean image tell nothing of sparsity
            fresh, n = either(rows.tick == 0, both(starts, nonzeros == 0)), rows.x[0].numel()
            rows.keep = where(fresh, self.top_fraction * n, rows.keep)
            rows.nonzeros = where(fresh, n, rows.nonzeros)
        return sparser


def one_stage(eps: float, n_iter: int) -> Stages:
    """All steps at the radius itself."""
    return [(eps, n_iter)]


def shrinking(eps: float, n_iter: int) -> Stages:
    """Three stages of radius 3, 2 and 1 eps with 30, 30 and 40 % of the steps: how L1 is evaluated (arXiv 2103.01208, section 4)."""
    first = int(0.3 * n_iter)
    return [(3 * eps, first), (2 * eps, first), (eps, n_iter - 2 * first)]


@dataclass(frozen=True)
class NormSpec:
    """A norm ||.|| of perturbations delta = x_adv - x. B examples, any image shape; radii eps in pixels of [0, 1].

    No function of it may branch on data, so that no GPU waits.
    """

    name: str
    project: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(delta (B, ...), x (B, ...), eps (B,)) -> the nearest delta with ||delta|| <= eps and x + delta in [0, 1]."""
    steepest: Callable[[Tensor, Tensor], Tensor]
    """(grad (B, ...), keep (B,)) -> direction of steepest ascent with ||.|| = 1; `keep`: entries that a sparse one has."""
    size: Callable[[Tensor], Tensor]
    """delta (B, ...) -> ||delta|| (B,), in the precision of delta; must grow with each |delta_i|."""
    random_start: Callable[[Tensor, float], Tensor]
    """(standard normal noise (B, ...), eps) -> delta (B, ...) where a run of an evaluation starts, before it is projected."""
    controller: type[StepController] = HalvingController  # step sizes and momentum of APGD
    stages: Callable[[float, int], Stages] = one_stage  # (eps, n_iter) -> a full run of an evaluation
    restarts: tuple[int, int] = (1, 9)  # runs of APGD-CE and of APGD-T in the standard evaluation
    brief_first: bool = False  # a run of n_iter / 5 steps at eps goes first, for the union before other norms' runs
    seed: int | None = None  # sets its random starts apart from other norms'; None: from its name
    pyautoattack: bool = False  # that library attacks in this norm, under this name
    per_pixel: bool = False  # eps bounds each pixel alone: told as n/255 where that is exact
    colour: str | None = None  # in pictures; None: the picture's next one

    @property
    def seed_number(self) -> int:
        """What stands for the norm in the keys of random generators."""
        return zlib.crc32(self.name.encode()) if self.seed is None else self.seed


NORMS: dict[str, NormSpec] = {}


def register_norm(spec: NormSpec) -> NormSpec:
    """Make the norm known by its name, to Threat and all attacks. Raises ValueError if that name is taken by another one."""
    if NORMS.get(spec.name, spec) != spec:
        raise ValueError(f"there is a norm called {spec.name!r} already")
    NORMS[spec.name] = spec
    return spec


def lp_size(order: float, delta: Tensor) -> Tensor:
    """Lp norms (B,) of delta (B, ...)."""
    return torch.linalg.vector_norm(delta.flatten(1), ord=order, dim=1)


def uniform_in_cube(noise: Tensor, eps: float) -> Tensor:
    """Uniform in [-eps, eps] at each pixel."""
    return eps * (2 * torch.special.ndtr(noise) - 1)


def on_sphere(noise: Tensor, eps: float) -> Tensor:
    """Uniform on the sphere of L2 radius eps."""
    return eps * noise / expand_per_example(noise.flatten(1).norm(dim=1), noise)


def as_it_is(noise: Tensor, eps: float) -> Tensor:
    """Noise of deviation 1 whatever the radius, far outside an L1 ball: its projection is sparse."""
    return noise


register_norm(NormSpec(
    "Linf", project_linf, steepest_linf, partial(lp_size, float("inf")), uniform_in_cube,
    seed=0, pyautoattack=True, per_pixel=True, colour="#0072b2",
))  # fmt: skip
register_norm(NormSpec(
    "L2", project_l2, steepest_l2, partial(lp_size, 2.0), on_sphere, seed=1, pyautoattack=True, colour="#009e73"
))  # fmt: skip
register_norm(NormSpec(
    "L1", project_l1, steepest_l1, partial(lp_size, 1.0), as_it_is, SparseController, shrinking, restarts=(5, 5), brief_first=True,
    seed=2, pyautoattack=True, colour="#d55e00",
))  # fmt: skip
