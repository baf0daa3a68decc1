"""Robust accuracy against the radius (a security curve), each radius' outcome used for the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from attacks.evaluator import EvaluationContext, ThreatEvaluator
from attacks.plan import AttackRun
from attacks.results import AttackLog, Evaluation
from attacks.threat import Threat

BELOW, ABOVE = (0.25, 0.5, 0.75), (1.25, 1.5, 1.75, 2.0)  # of the evaluation's radius


def below(threat: Threat) -> list[Threat]:
    """Smaller radii, from the smallest up."""
    return [Threat(threat.norm, factor * threat.eps) for factor in BELOW]


def above(threat: Threat) -> list[Threat]:
    """Larger radii, from the smallest up."""
    return [Threat(threat.norm, factor * threat.eps) for factor in ABOVE]


def curve_logs(threats: Sequence[Threat], n: int) -> dict[Threat, AttackLog]:
    """An empty log of one APGD-CE on n examples at each of the other radii."""
    radii = [radius for threat in threats for radius in (*below(threat), *above(threat))]
    return {radius: AttackLog.empty([AttackRun("CE")], n) for radius in radii}


def make_curve_runs(
    context: EvaluationContext, logs: Mapping[Threat, AttackLog], curve: Mapping[Threat, AttackLog], chosen: Tensor
) -> None:
    """Fill the curve's logs on the examples chosen (N,) bool: one robust at eps is robust below, one broken at a radius is broken above."""
    for threat, log in logs.items():
        for radii, pending in ((below(threat), chosen & log.broken), (above(threat), chosen & ~log.broken)):
            for radius in radii:
                ThreatEvaluator(context, radius, curve[radius]).run(pending)
                pending = pending & ~curve[radius].broken


def accuracy_curve(evaluation: Evaluation, threat: Threat, curve: Mapping[Threat, AttackLog]) -> list[list[float]]:
    """(radius, per cent) from 0 to 2 eps; the logs at the other radii have who broke there first."""
    rows = [[0.0, _per_cent(evaluation.clean)]]
    for radii, robust, own in (
        (below(threat), evaluation.clean, []),
        (above(threat), evaluation.robust(threat), [threat]),
    ):
        rows += [[radius.eps, _per_cent(robust)] for radius in own]
        for radius in radii:
            robust = robust & ~curve[radius].broken
            rows.append([radius.eps, _per_cent(robust)])
    return rows


def _per_cent(robust: Tensor) -> float:
    return round(100 * float(robust.double().mean()), 2)
