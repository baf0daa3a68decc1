"""Exact Euclidean projections on {||delta||_p <= eps} and {x + delta in [0, 1]}; no branch depends on data, so no GPU waits.

Every function takes delta (B, ...) and x (B, ...) of one shape, x in [0, 1], and a radius for each example,
and gives the nearest allowed delta.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expand_per_example(per_example: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1), to meet `like` (B, ...)."""
    return per_example.view(-1, *[1] * (like.dim() - 1))


def project_linf(delta: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """Nearest point to delta (B, ...) with |delta_i| <= eps (B,) and x + delta in [0, 1]."""
    eps = expand_per_example(eps, x)
    return torch.minimum(torch.maximum(delta, (-x).clamp(min=-eps)), (1 - x).clamp(max=eps))


def project_l2(delta: Tensor, x: Tensor, eps: Tensor, n_steps: int = 8) -> Tensor:
    """Nearest point to delta (B, ...) with L2 norm <= eps (B,) and x + delta in [0, 1].

    It is sign(delta) * min(s |delta|, room) for the largest s <= 1 that meets the radius: a root of the concave function
    sum(min(s^2 delta^2, room^2)) - eps^2 of s^2. Newton's steps come from below, so each stays in the ball, and the answer is exact
    once the entries that touch the box are found.
    """
    size, room = _size_and_room(delta, x)
    # Dividing by the largest entry first keeps the squares of huge steps finite.
    scale = size.amax(1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
    unit = size / scale
    unit2, room2, left, free = unit.square(), room.square(), torch.empty_like(unit), torch.empty_like(unit)
    radius2 = eps[:, None].square()
    # (s * scale)^2, first the answer where no entry touches the box.
    shrink2 = radius2 / unit2.sum(1, keepdim=True).clamp(min=1)
    for _ in range(n_steps - 1):
        torch.mul(unit2, shrink2, out=left)
        torch.lt(left, room2, out=free)  # 0 and 1 as floats: bool is slow on CPUs
        slope = free.mul_(unit2).sum(1, keepdim=True)
        missing = radius2 - torch.minimum(left, room2, out=left).sum(1, keepdim=True)
        # With every entry at the box the slope is 0: infinity is as good as 1 then, and fmax leaves out 0 / 0.
        shrink2 = torch.fmax(shrink2, torch.addcdiv(shrink2, missing, slope))
    shrink = torch.minimum(shrink2.sqrt(), scale)
    return torch.copysign(torch.minimum(unit * shrink, room), delta.flatten(1)).view(delta.shape)


def project_l1(delta: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """Nearest point to delta (B, ...) with L1 norm <= eps (B,) and x + delta in [0, 1] (arXiv 2103.01208, section 3).

    It is sign(delta) * min(max(|delta| - t, 0), room) for the smallest t >= 0 that meets the radius, found by bisection up to
    the resolution of the largest entry. (Faster converging methods miss the right piece on some deltas: docs/log.md.)
    """
    size, room = _size_and_room(delta, x)
    zero = size.new_zeros(())
    left = torch.minimum(size, room)
    fits = left.sum(1, keepdim=True) <= eps[:, None]
    low = torch.zeros_like(size[:, :1])
    high = start = torch.where(fits, 0, size.amax(1, keepdim=True))
    for step in range(1 - round(math.log2(torch.finfo(size.dtype).eps))):
        t = torch.add(low, start, alpha=0.5 ** (step + 1))
        torch.clamp(torch.sub(size, t, out=left), zero, room, out=left)  # in place: memory traffic is the cost here
        outside = left.sum(1, keepdim=True) > eps[:, None]
        low, high = torch.where(outside, t, low), torch.where(outside, high, t)
    torch.clamp(torch.sub(size, high, out=left), zero, room, out=left)
    return torch.copysign(left, delta.flatten(1)).view(delta.shape)


def _size_and_room(delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """|delta| and how far each entry may go in its direction before it meets the box, both (B, N)."""
    return delta.flatten(1).abs(), torch.where(delta > 0, 1 - x, x).flatten(1)
