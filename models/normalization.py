"""Input normalisation inside a network: images stay in [0, 1], where radii are measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Mean and standard deviation of each channel that many published networks use.
NORMALIZATIONS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
Statistic = str | Sequence[float] | None  # a name in NORMALIZATIONS, or a number for each channel or for all


class Normalized(nn.Module):
    """(B, C, H, W) in [0, 1] -> what `model` makes of (x - mean) / std, with mean and std (C,) or (1,)."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model((x - self.mean) / self.std)
        return out


def statistics(mean: Statistic, std: Statistic) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation that --mean and --std ask for, None if neither does; a name given once stands for both.

    Raises ValueError for numbers of one without the other, for other lengths, and for values that are no such statistics.
    """
    if mean is None and std is None:
        return None
    name = next((each for each in (mean, std) if isinstance(each, str)), None)
    mean, std = (name if each is None else each for each in (mean, std))
    if mean is None or std is None:
        raise ValueError("give both --mean and --std, or the name of both")
    found = _values(mean, 0), _values(std, 1)
    if len(found[0]) != len(found[1]) or not found[0]:
        raise ValueError(f"--mean has {len(found[0])} values and --std {len(found[1])}")
    if not all(map(math.isfinite, found[0] + found[1])) or min(found[1]) <= 0:
        raise ValueError(f"{found[0]} and {found[1]} are no mean and standard deviation")
    return found


def _values(given: str | Sequence[float], which: int) -> tuple[float, ...]:
    """The numbers, or the mean (which = 0) or standard deviation (1) of that name."""
    return NORMALIZATIONS[given][which] if isinstance(given, str) else tuple(map(float, given))


def normalized(model: nn.Module, mean: Statistic, std: Statistic) -> nn.Module:
    """The model behind a `Normalized`; itself if neither mean nor std is given. Raises ValueError."""
    found = statistics(mean, std)
    return Normalized(model, *found) if found else model
