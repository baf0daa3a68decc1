"""Optimizers that --optimizer names: one object each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import optim


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer, the flags of its own with their defaults, and what is usual for it if --lr-max or --weight_decay is left out."""

    build: Callable[..., optim.Optimizer]  # build(groups, lr=, fused=, and its own flags)
    flags: Mapping[str, Any]
    lr_max: tuple[float, float] | None = None  # from scratch, fine-tuning; None: the published ones, which are SGD's
    weight_decay: float | None = None  # likewise


OPTIMIZERS = {
    "sgd": OptimizerSpec(optim.SGD, {"momentum": 0.9, "nesterov": False}),
    "adamw": OptimizerSpec(optim.AdamW, {"betas": (0.9, 0.999)}, lr_max=(1e-3, 1e-4), weight_decay=0.05),
}
OWN_FLAGS = tuple({name: None for each in OPTIMIZERS.values() for name in each.flags})
