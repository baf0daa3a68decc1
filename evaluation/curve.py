"""Robust accuracy against the radius (a security curve), each radius' outcome used for the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attacks.results import AttackLog, AttackRun, Evaluation
from attacks.standard import EvaluationContext, ThreatEvaluator
from attacks.threat import Threat

FACTORS = (0.25, 0.5, 0.75, 1.25, 1.5, 1.75, 2.0)  # of the evaluation's radius, where no radii are given
CurveRadii = Mapping[Threat, Sequence[Threat]]
"""By threat model of the evaluation the other radii of its curve, increasing: the same norm at each."""


def curve_radii(threats: Sequence[Threat], asked: Mapping[str, Sequence[float]] | None) -> dict[Threat, list[Threat]]:
    """The radii of each curve that is asked for: by norm its radii in any order, none for multiples of the evaluation's, 0 to 2 eps."""
    found = {}
    for threat in threats:
        if asked is not None and threat.norm in asked:
            radii = sorted(asked[threat.norm]) or [factor * threat.eps for factor in FACTORS]
            others = [eps for eps in radii if not math.isclose(eps, threat.eps, rel_tol=1e-6)]
            found[threat] = [Threat(threat.norm, eps) for eps in others]
    return found


def curve_logs(radii: CurveRadii, n: int) -> dict[Threat, AttackLog]:
    """An empty log of one APGD-CE on n examples at each of the other radii."""
    return {radius: AttackLog.empty([AttackRun("CE")], n) for others in radii.values() for radius in others}


def below_and_above(threat: Threat, others: Sequence[Threat]) -> tuple[list[Threat], list[Threat]]:
    """The radii smaller and larger than the evaluation's own."""
    return [each for each in others if each.eps < threat.eps], [each for each in others if each.eps > threat.eps]


def make_curve_runs(
    context: EvaluationContext,
    radii: CurveRadii,
    logs: Mapping[Threat, AttackLog],
    curve: Mapping[Threat, AttackLog],
    chosen: Tensor,
) -> None:
    """Fill the curve's logs on the examples chosen (N,) bool: one robust at eps is robust below, one broken at a radius is broken above."""
    for threat, others in radii.items():
        below, above = below_and_above(threat, others)
        for group, pending in ((below, chosen & logs[threat].broken), (above, chosen & ~logs[threat].broken)):
            for radius in group:
                ThreatEvaluator(context, radius, curve[radius]).run(pending)
                pending = pending & ~curve[radius].broken


def curve_warnings(radii: CurveRadii, curve: Mapping[Threat, AttackLog]) -> list[str]:
    """At how many examples logits or gradients were not finite at the other radii."""
    found = []
    for threat, others in radii.items():
        logs = [curve[radius].not_finite for radius in others]
        if logs and (number := int(torch.stack(logs).any(0).sum())):
            found.append(
                f"{threat.norm}'s security curve: logits or gradients were infinite or NaN at {number} images: it may be far too high"
            )
    return found


def accuracy_curve(
    evaluation: Evaluation, threat: Threat, others: Sequence[Threat], curve: Mapping[Threat, AttackLog]
) -> list[list[float]]:
    """[radius, per cent] from 0 on, the evaluation's radius among them; the logs at the other radii have who broke there first."""
    rows = []
    below, above = below_and_above(threat, others)
    for eps, robust, group in ((0.0, evaluation.clean, below), (threat.eps, evaluation.robust(threat), above)):
        rows.append((eps, robust))
        for radius in group:
            robust = robust & ~curve[radius].broken
            rows.append((radius.eps, robust))
    return [[eps, round(100 * float(robust.double().mean()), 2)] for eps, robust in rows]
