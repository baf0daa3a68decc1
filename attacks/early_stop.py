"""When a run of an attack is hopeless, so that --attacks=quick drops it, or does not begin it: the same rule for all networks and norms.

A margin is the difference of the largest other logit and the label's, over the spread of the largest logits as in the targeted DLR loss:
positive where the image is misclassified, and the same for logits times any number. After a few steps a run that would need a far larger
rise than the last ones to become positive is dropped. In a stage of a larger radius (L1) that is judged by itself: what does not break an
image in a larger ball does not in a smaller one. Where a norm has scouts, shorter runs with the same aim, a full run is begun only if its
scout came near, or rose so much that it may. Scouts, and L1's brief run, are short already and never dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .results import AttackRun

CHECKS = (6, 12, 25, 50)  # steps of a stage after which a run may be dropped
RISE = 2.0  # the rise still hoped for, times the rise in the second half of the steps so far
SCOUT_RISE = 0.5  # and after a scout, times its rise in its last stage
RESERVE, NEAR = 0.1, 0.2  # at the default effort: a rise that is always hoped for; a scout's distance for a full run
DEFAULT_EFFORT, FULL_EFFORT = 3, 10


@dataclass(frozen=True)
class EarlyStop:
    """The rule with its two distances, which grow with the effort; infinite ones drop nothing. More effort never breaks fewer examples."""

    reserve: float
    near: float

    @classmethod
    def of(cls, effort: int) -> EarlyStop:
        """For an effort from 1 to 10, at which nothing is dropped."""
        if effort >= FULL_EFFORT:
            return cls(float("inf"), float("inf"))
        return cls(RESERVE * effort / DEFAULT_EFFORT, NEAR * effort / DEFAULT_EFFORT)

    def hopeless(self, best: Tensor, half: Tensor, step: Tensor) -> Tensor:
        """(B,) bool: `best` margin of this stage so far and at half of its steps (B,), after `step` steps of it (B,)."""
        hoped = (RISE * (best - half)).clamp(min=self.reserve)
        return torch.isin(step, torch.tensor(CHECKS)) & (best + hoped < 0)

    def begins(self, runs: Sequence[AttackRun], number: int, reach: Sequence[float]) -> bool:
        """Is the run worth it on an example of which an AttackLog tells reach (R)? One with a scout is if that came near."""
        run = runs[number]
        scouts = [i for i, each in enumerate(runs) if each.scout and each.kind == run.kind]
        # APGD-CE has one for all restarts.
        own = [i for i in scouts if run.kind == "CE" or runs[i].number == run.number]
        return run.scout or not own or reach[own[0]] > -self.near


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """(B,) of logits (B, K) and labels (B,); 0, at which no run is hopeless, where logits are not finite."""
    logits = logits.float()
    own = logits.gather(1, y[:, None])[:, 0]
    other = logits.scatter(1, y[:, None], float("-inf")).amax(1)
    top = logits.topk(min(4, logits.shape[1]), dim=1).values
    low = (top[:, 2] + top[:, 3]) / 2 if top.shape[1] == 4 else top[:, -1]
    return ((other - own) / (top[:, 0] - low + 1e-12)).nan_to_num(0, 0, 0)
