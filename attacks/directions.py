"""Directions of steepest ascent, of length 1 in a norm: grad (B, ...) -> (B, ...); nothing depends on data, so no GPU waits.

`keep` (B,) is how many entries of each example a sparse direction has; the dense ones, of Linf and L2, do not need it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .projections import expand_per_example


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
