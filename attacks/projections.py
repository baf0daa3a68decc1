"""Exact Euclidean projections on {||delta||_p <= eps} and {x + delta in [0, 1]}; no branch depends on data, so no GPU waits.

Every function takes delta (B, ...) and x (B, ...) of one shape, x in [0, 1], and a radius for each example,
and gives the nearest allowed delta. CPUs search by passes over the entries, since a sort costs them many times as much; other
devices sort, since each pass of a search is some more kernels to launch (docs/performance.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expand_per_example(per_example: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1), to meet `like` (B, ...)."""
    return per_example.view(-1, *[1] * (like.dim() - 1))


def sorts(like: Tensor) -> bool:
    """Is a sort quicker than a search by many passes on the tensor's device?"""
    return like.device.type != "cpu"


def project_linf(delta: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """Nearest point to delta (B, ...) with |delta_i| <= eps (B,) and x + delta in [0, 1]."""
    eps = expand_per_example(eps, x)
    return torch.clamp(delta, -torch.minimum(x, eps), torch.minimum(1 - x, eps))


def project_l2(delta: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """Nearest point to delta (B, ...) with L2 norm <= eps (B,) and x + delta in [0, 1].

    It is sign(delta) * min(s |delta|, room) for the largest s <= 1 that meets the radius: a root of
    g(s^2) - eps^2, where g(u) = sum(min(u delta^2, room^2)) is concave.
    """
    size, room = _size_and_room(delta, x)
    # Dividing by the largest entry first keeps the squares of huge steps finite.
    scale = size.amax(1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
    unit = size / scale
    shrink2 = (shrink2_by_sort if sorts(x) else shrink2_by_newton)(unit, room, eps[:, None].square())
    shrink = torch.minimum(shrink2.sqrt(), scale)
    return torch.copysign(torch.minimum(unit * shrink, room), delta.flatten(1)).view(delta.shape)


def shrink2_by_sort(unit: Tensor, room: Tensor, radius2: Tensor) -> Tensor:
    """u (B, 1) with g(u) = radius2 (B, 1) for unit = |delta| (B, N); at least the largest u that matters if all u fit.

    For a set of entries at the box, the others free, g(u) is at most the sum of the box's room^2 and u times the free delta^2,
    and equal for the true set, which is among those with the smallest room / |delta|. So u is the largest of these sets' roots.
    """
    room2, unit2 = room.square(), unit.square()
    _, order = (room2 / unit2).sort(1)
    at_box = room2.gather(1, order).cumsum(1)[:, :-1]
    # From the other end, not total - cumsum: the difference would lose the small entries.
    free = unit2.gather(1, order.flip(1)).cumsum(1).flip(1)
    none_at_box = radius2 / free[:, :1]
    roots = torch.cat([none_at_box, (radius2 - at_box) / free[:, 1:]], 1)
    # 0 / 0 where all that may move is at the box: another set's root counts.
    return roots.nan_to_num_(0).amax(1, keepdim=True)


def shrink2_by_newton(unit: Tensor, room: Tensor, radius2: Tensor, n_steps: int = 8) -> Tensor:
    """The same by Newton's steps. They come from below, so each stays in the ball; exact once the entries at the box are found."""
    unit2, room2, left, free = unit.square(), room.square(), torch.empty_like(unit), torch.empty_like(unit)
    # (s * scale)^2, first the answer where no entry touches the box.
    shrink2 = radius2 / unit2.sum(1, keepdim=True).clamp(min=1)
    for _ in range(n_steps - 1):
        torch.mul(unit2, shrink2, out=left)
        torch.lt(left, room2, out=free)  # 0 and 1 as floats: bool is slow on CPUs
        slope = free.mul_(unit2).sum(1, keepdim=True)
        missing = radius2 - torch.minimum(left, room2, out=left).sum(1, keepdim=True)
        # With every entry at the box the slope is 0: infinity is as good as 1 then, and fmax leaves out 0 / 0.
        shrink2 = torch.fmax(shrink2, torch.addcdiv(shrink2, missing, slope))
    return shrink2


def project_l1(delta: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """Nearest point to delta (B, ...) with L1 norm <= eps (B,) and x + delta in [0, 1] (arXiv 2103.01208, section 3).

    It is sign(delta) * min(max(|delta| - t, 0), room) for the smallest t >= 0 that meets the radius.
    """
    size, room = _size_and_room(delta, x)
    threshold = (threshold_by_sort if sorts(x) else threshold_by_bisection)(size, room, eps[:, None])
    left = torch.minimum(size.sub_(threshold).clamp_(min=0), room)
    if sorts(x):  # rounding may leave too much, above all of entries so large that size - room is size
        left = left * (eps[:, None] / left.sum(1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)).clamp(max=1)
    return torch.copysign(left, delta.flatten(1)).view(delta.shape)


def threshold_by_sort(size: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """t (B, 1) for size = |delta| (B, N), room (B, N) and eps (B, 1).

    The norm of what is left is piecewise linear and falls with t: an entry begins to move where t = size, and meets the box
    where t = size - room. Between these points, from the largest down, the slope is the number of moving entries.
    """
    point, order = torch.cat([size, size - room], 1).sort(1, descending=True)
    moving = torch.where(order < size.shape[1], 1.0, -1.0).cumsum(1)
    # The norm at each point but the first, where it is 0. All terms are >= 0, so that no rounding error is magnified.
    norm = (moving[:, :-1] * (point[:, :-1] - point[:, 1:])).cumsum(1)
    inside = norm <= eps
    last = inside.sum(1, keepdim=True)  # number of the last point inside the ball
    missing = eps - torch.where(inside, norm, 0).amax(1, keepdim=True)
    t = point.gather(1, last) - missing / moving.gather(1, last).clamp(min=1)
    return t.clamp(min=0)


def threshold_by_bisection(size: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """The same, rounded up to the resolution of the largest entry. (Faster converging searches miss the right piece: docs/log.md.)"""
    zero = size.new_zeros(())
    left = torch.minimum(size, room)
    fits = left.sum(1, keepdim=True) <= eps
    low = torch.zeros_like(size[:, :1])
    high = start = torch.where(fits, 0, size.amax(1, keepdim=True))
    for step in range(1 - round(math.log2(torch.finfo(size.dtype).eps))):
        t = torch.add(low, start, alpha=0.5 ** (step + 1))
        torch.clamp(torch.sub(size, t, out=left), zero, room, out=left)  # in place: memory traffic is the cost here
        outside = left.sum(1, keepdim=True) > eps
        low, high = torch.where(outside, t, low), torch.where(outside, high, t)
    return high


def _size_and_room(delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """|delta| and how far each entry may go in its direction before it meets the box, both (B, N)."""
    return delta.flatten(1).abs(), torch.where(delta > 0, 1 - x, x).flatten(1)
