"""Robust accuracy against the radius (a security curve), each radius' outcome used for the others."""

from __future__ import annotations

import torch
from torch import Tensor

from attacks.threat import Threat
from evaluation.results import AttackLog, Evaluation

BELOW, ABOVE = (0.25, 0.5, 0.75), (1.25, 1.5, 1.75, 2.0)  # of the evaluation's radius


def below(threat: Threat) -> list[Threat]:
    """Smaller radii, from the smallest up."""
    return [Threat(threat.norm, factor * threat.eps) for factor in BELOW]


def above(threat: Threat) -> list[Threat]:
    """Larger radii, from the smallest up."""
    return [Threat(threat.norm, factor * threat.eps) for factor in ABOVE]


def accuracy_curve(evaluation: Evaluation, threat: Threat, logs: dict[Threat, AttackLog]) -> list[list[float]]:
    """(radius, per cent) from 0 to 2 eps; the logs at the other radii have who broke there first."""
    curve = [[0.0, _per_cent(evaluation.clean)]]
    for radii, standing, own in (
        (below(threat), evaluation.clean, []),
        (above(threat), evaluation.robust(threat), [threat]),
    ):
        curve += [[radius.eps, _per_cent(standing)] for radius in own]
        for radius in radii:
            standing = standing & ~logs[radius].broken
            curve.append([radius.eps, _per_cent(standing)])
    return curve


def _per_cent(standing: Tensor) -> float:
    return round(100 * float(standing.to(torch.float64).mean()), 2)
