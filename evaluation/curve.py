"""Robust accuracy against the radius (a security curve), each radius' outcome used for the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attacks.results import AttackLog, AttackRun, Evaluation
from attacks.standard import EvaluationContext, ThreatEvaluator
from attacks.threat import Threat

BELOW, ABOVE = (0.25, 0.5, 0.75), (1.25, 1.5, 1.75, 2.0)  # of the evaluation's radius


def scaled(threat: Threat, factors: Sequence[float]) -> list[Threat]:
    """The norm at these multiples of its radius."""
    return [Threat(threat.norm, factor * threat.eps) for factor in factors]


def curve_logs(threats: Sequence[Threat], n: int) -> dict[Threat, AttackLog]:
    """An empty log of one APGD-CE on n examples at each of the other radii."""
    radii = [radius for threat in threats for radius in scaled(threat, BELOW + ABOVE)]
    return {radius: AttackLog.empty([AttackRun("CE")], n) for radius in radii}


def make_curve_runs(
    context: EvaluationContext, logs: Mapping[Threat, AttackLog], curve: Mapping[Threat, AttackLog], chosen: Tensor
) -> None:
    """Fill the curve's logs on the examples chosen (N,) bool: one robust at eps is robust below, one broken at a radius is broken above."""
    for threat, log in logs.items():
        for factors, pending in ((BELOW, chosen & log.broken), (ABOVE, chosen & ~log.broken)):
            for radius in scaled(threat, factors):
                ThreatEvaluator(context, radius, curve[radius]).run(pending)
                pending = pending & ~curve[radius].broken


def curve_warnings(threats: Sequence[Threat], curve: Mapping[Threat, AttackLog]) -> list[str]:
    """At how many examples logits or gradients were not finite at the other radii."""
    found = []
    for threat in threats:
        logs = [curve[radius].not_finite for radius in scaled(threat, BELOW + ABOVE)]
        if number := int(torch.stack(logs).any(0).sum()):
            found.append(
                f"{threat.norm}'s security curve: logits or gradients were infinite or NaN at {number} images: it may be far too high"
            )
    return found


def accuracy_curve(evaluation: Evaluation, threat: Threat, curve: Mapping[Threat, AttackLog]) -> list[list[float]]:
    """[radius, per cent] from 0 to 2 eps; the logs at the other radii have who broke there first."""
    rows = []
    for eps, robust, factors in ((0.0, evaluation.clean, BELOW), (threat.eps, evaluation.robust(threat), ABOVE)):
        rows.append((eps, robust))
        for radius in scaled(threat, factors):
            robust = robust & ~curve[radius].broken
            rows.append((radius.eps, robust))
    return [[eps, round(100 * float(robust.double().mean()), 2)] for eps, robust in rows]
