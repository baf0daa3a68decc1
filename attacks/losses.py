"""Losses that the attacks maximise: logits (B, K), labels (B,) -> one value per example (B,)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each example, (B,)."""
    return F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, (B,): -(z_y - max_{i != y} z_i) / (z_(1) - z_(3)); needs K >= 3 (arXiv 2003.01690, equation 6)."""
    top = logits.topk(3, dim=1).values
    own = _pick(logits, y)
    # Where the label's logit is the largest (or ties with it), the best other one is the second.
    other = torch.where(own == top[:, 0], top[:, 1], top[:, 0])
    return -(own - other) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted DLR, (B,): -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2); needs K >= 4 (arXiv 2003.01690, equation 7)."""
    top = logits.topk(4, dim=1).values
    return -(_pick(logits, y) - _pick(logits, target)) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def margin_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """z_t - z_y, (B,): the targeted loss for fewer than four classes, where the DLR loss is not defined."""
    return _pick(logits, target) - _pick(logits, y)


def _pick(logits: Tensor, index: Tensor) -> Tensor:
    return logits.gather(1, index[:, None])[:, 0]
