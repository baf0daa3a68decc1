"""Learning-rate schedules: functions from progress, the fraction of training done, in [0, 1), to a learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import accumulate

Schedule = Callable[[float], float]
Shape = Callable[[float, float], float]  # (progress, lr_max) -> learning rate
SHAPES: dict[str, Shape] = {
    "superconverge": lambda progress, lr_max: lr_max * min(progress / 0.4, (1 - progress) / 0.6),
    "cosine": lambda progress, lr_max: lr_max * (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress, lr_max: lr_max * (1 - progress),
}
MOST_SPANS = 20  # a rate of lr_max / 10**19 trains nothing


def lr_schedule(name: str, lr_max: float, warmup: float = 0.0) -> Schedule:
    """The schedule called `name`: progress in [0, 1) -> learning rate. Raises ValueError for an unknown name.

    piecewise: /10 at 1/2 and 3/4; piecewise-ft: at 1/3 and 2/3; piecewise-a-b-...: spans in these proportions, /10 at each border;
    superconverge: linear 0 -> lr_max over the first 2/5, then linear to 0; cosine, linear: from lr_max to 0 along half a cosine or a line.
    In the first `warmup` of the training, a fraction, the rate is multiplied by what rises linearly from 0 to 1.
    """
    shape = SHAPES.get(name) or _piecewise(name)
    if not warmup:
        return lambda progress: shape(progress, lr_max)
    return lambda progress: shape(progress, lr_max) * min(progress / warmup, 1.0)


def _piecewise(name: str) -> Shape:
    milestones = _milestones(name)
    return lambda progress, lr_max: lr_max / 10 ** sum(progress >= milestone for milestone in milestones)


def _milestones(name: str) -> list[float]:
    if name == "piecewise":
        return [1 / 2, 3 / 4]
    if name == "piecewise-ft":
        return [1 / 3, 2 / 3]
    head, *spans = name.split("-")
    numbers = all(re.fullmatch("0*[1-9][0-9]{0,8}", span) for span in spans)
    if head == "piecewise" and numbers and 1 <= len(spans) <= MOST_SPANS:
        borders = list(accumulate(int(span) for span in spans))
        return [border / borders[-1] for border in borders[:-1]]
    names = f"piecewise, piecewise-ft, piecewise-A-B-... (as piecewise-70-10), {', '.join(SHAPES)}"
    raise ValueError(f"unknown schedule {name!r}; choose one of {names}")
