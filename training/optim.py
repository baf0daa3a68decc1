"""Parameter groups, learning-rate schedules and averaged weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from torch import nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Schedule = Callable[[float], float]


def lr_schedule(name: str, lr_max: float) -> Schedule:
    """The schedule called `name`: progress in [0, 1) -> learning rate. Raises ValueError for an unknown name.

    piecewise: /10 at 1/2 and 3/4; piecewise-ft: at 1/3 and 2/3; piecewise-a-b-...: spans in these proportions, /10 at each border;
    superconverge: linear 0 -> lr_max over the first 2/5, then linear to 0.
    """
    if name == "superconverge":
        return lambda progress: lr_max * min(progress / 0.4, (1 - progress) / 0.6)
    milestones = _milestones(name)
    return lambda progress: lr_max / 10 ** sum(progress >= milestone for milestone in milestones)


def _milestones(name: str) -> list[float]:
    if name == "piecewise":
        return [1 / 2, 3 / 4]
    if name == "piecewise-ft":
        return [1 / 3, 2 / 3]
    head, *spans = name.split("-")
    if head == "piecewise" and spans and all(span.isdecimal() and int(span) > 0 for span in spans):
        borders = list(accumulate(int(span) for span in spans))
        return [border / borders[-1] for border in borders[:-1]]
    raise ValueError(
        f"unknown schedule {name!r}; choose piecewise, piecewise-ft, piecewise-A-B-... (as piecewise-70-10) or superconverge"
    )


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, lr_no_decay: float | None
) -> list[dict[str, object]]:
    """SGD groups as published for training from scratch: decay for weights, none for biases and norm layers (all 1-d parameters).

    lr_no_decay, if given, is the second group's constant rate (the published code's 1.0); else it follows the schedule.
    """
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {
            "params": others,
            "lr": lr if lr_no_decay is None else lr_no_decay,
            "weight_decay": 0.0,
            "constant_lr": lr_no_decay is not None,
        },
    ]


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving averages of weights and BatchNorm's statistics, of which an update keeps the share `decay`; first a copy."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    return average.requires_grad_(False).eval()


def set_lr(optimizer: optim.Optimizer, lr: float) -> None:
    """Set the rate of every parameter group but those marked `constant_lr`."""
    for group in optimizer.param_groups:
        if not group.get("constant_lr"):
            group["lr"] = lr
