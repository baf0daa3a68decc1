"""Robust accuracy against the radius (a security curve), each radius' outcome used for the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attacks.results import AttackLog, AttackRun, Evaluation
from attacks.standard import EvaluationContext, ThreatEvaluator
from attacks.threat import Threat

Curve = Mapping[Threat, AttackLog]  # what one APGD-CE breaks at each radius other than the evaluation's own


def curve_logs(radii: Sequence[Threat], n: int) -> dict[Threat, AttackLog]:
    """An empty log on n examples for each of the radii, in increasing order."""
    return {radius: AttackLog.empty([AttackRun("CE")], n) for radius in sorted(radii, key=lambda radius: radius.eps)}


def of_norm(threat: Threat, curve: Curve) -> tuple[list[Threat], list[Threat]]:
    """The curve's radii of the threat's norm, below and above its own."""
    radii = [radius for radius in curve if radius.norm == threat.norm]
    return [radius for radius in radii if radius.eps < threat.eps], [r for r in radii if r.eps > threat.eps]


def make_curve_runs(context: EvaluationContext, logs: Mapping[Threat, AttackLog], curve: Curve, chosen: Tensor) -> None:
    """Fill the curve's logs on the examples chosen (N,) bool: one robust at eps is robust below, one broken at a radius is broken above."""
    for threat, log in logs.items():
        starts = (chosen & log.broken, chosen & ~log.broken)
        for radii, pending in zip(of_norm(threat, curve), starts, strict=True):
            for radius in radii:
                ThreatEvaluator(context, radius, curve[radius]).run(pending)
                pending = pending & ~curve[radius].broken


def curve_warnings(threats: Sequence[Threat], curve: Curve) -> list[str]:
    """At how many examples logits or gradients were not finite at the other radii."""
    found = []
    for threat in threats:
        logs = [log.not_finite for radius, log in curve.items() if radius.norm == threat.norm]
        if number := int(torch.stack(logs).any(0).sum()) if logs else 0:
            found.append(
                f"{threat.norm}'s security curve: logits or gradients were infinite or NaN at {number} images: it may be far too high"
            )
    return found


def accuracy_curve(evaluation: Evaluation, threat: Threat, curve: Curve) -> list[list[float]]:
    """[radius, per cent] at 0, the curve's radii and the threat's own, in order; the logs at the other radii have who broke there first."""
    rows = []
    starts = ((0.0, evaluation.clean), (threat.eps, evaluation.robust(threat)))
    for (eps, robust), radii in zip(starts, of_norm(threat, curve), strict=True):
        rows.append((eps, robust))
        for radius in radii:
            robust = robust & ~curve[radius].broken
            rows.append((radius.eps, robust))
    return [[eps, round(100 * float(robust.double().mean()), 2)] for eps, robust in rows]
