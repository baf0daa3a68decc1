"""What an evaluation found: outcomes per point, accuracies with intervals, differences between two evaluations of the same points."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attacks.threat import Norm, Threat

RESTARTS: dict[Norm, tuple[int, int]] = {"Linf": (1, 9), "L2": (1, 9), "L1": (5, 5)}


@dataclass(frozen=True)
class AttackRun:
    """One run of an attack on a point: cross-entropy (CE, brief), to the `number`-th most likely other class (T), FAB-T or Square."""

    kind: str
    number: int = 0  # of the restart, from 0, or of the target, from 1

    def __str__(self) -> str:
        match self.kind:
            case "CE":
                return f"APGD-CE restart {self.number + 1}"
            case "T":
                return f"APGD-T target {self.number}"
            case "brief":
                return "APGD-CE, one radius, a fifth of the steps"
        return self.kind


def runs_for(
    attacks: str, norm: Norm, num_classes: int, n_restarts: int | None = None, n_targets: int | None = None
) -> list[AttackRun]:
    """The runs on each point that stands, in turn.

    standard: APGD-CE and APGD-T, 10 in all, 1 restart + 9 targets for Linf and L2, 5 + 5 for L1 (arXiv 2105.12508, section 5), where
    a brief run at the radius itself comes first: runs of three radii can break a point in their last 40 % alone, this one breaks most of
    what breaks within a few steps. fast: one APGD-CE; autoattack: standard, then FAB-T and Square. n_restarts and n_targets change
    the numbers; there are at most num_classes - 1 targets.
    """
    restarts, targets = (1, 0) if attacks == "fast" else RESTARTS[norm]
    restarts = restarts if n_restarts is None else n_restarts
    targets = min(targets if n_targets is None else n_targets, num_classes - 1)
    more = [AttackRun("FAB-T"), AttackRun("Square")] if attacks == "autoattack" else []
    brief = [AttackRun("brief")] if norm == "L1" and attacks != "fast" else []
    return (
        brief + [AttackRun("CE", r) for r in range(restarts)] + [AttackRun("T", t + 1) for t in range(targets)] + more
    )


@dataclass
class AttackLog:
    """What R runs in one threat model did to N points."""

    runs: list[AttackRun]
    passes: Tensor  # (N, R) int32: forward passes that the run spent on the point; 0: it was not attacked
    broken_by: Tensor  # (N,) int64: number of the run that broke it; -1: none did

    @property
    def broken(self) -> Tensor:
        """(N,) bool."""
        return self.broken_by >= 0

    def next_run(self, point: int) -> int:
        """Number of the first run that was not made on the point."""
        return int((self.passes[point] > 0).sum())


@dataclass
class Evaluation:
    """What stands, for each of N points."""

    clean: Tensor  # (N,) bool: right without an attack
    logs: dict[Threat, AttackLog] = field(default_factory=dict)
    union_only: bool = False  # points broken in one norm were not attacked in others: only clean and union are known
    curve: dict[Threat, list[list[float]]] = field(
        default_factory=dict
    )  # [radius, accuracy in per cent] from 0 to 2 eps
    warnings: list[str] = field(default_factory=list)  # why the figures should not be believed

    def robust(self, threat: Threat) -> Tensor:
        """(N,) bool: right, and no attack in this threat model broke it."""
        return self.clean & ~self.logs[threat].broken

    @property
    def union(self) -> Tensor:
        """(N,) bool: right, and broken under no norm."""
        return torch.stack([self.clean, *(self.robust(threat) for threat in self.logs)]).all(0)

    def outcomes(self) -> dict[str, Tensor]:
        """Per point (N,), in [0, 1]: clean, each norm, average over the norms, union; without the norms if union_only."""
        rows = {"clean": self.clean}
        if not self.logs:
            return rows
        if self.union_only:
            return rows | {"union": self.union}
        norms = {threat.norm: self.robust(threat) for threat in self.logs}
        average = torch.stack([robust.float() for robust in norms.values()]).mean(0)
        return rows | norms | {"average": average, "union": self.union}


def accuracy_table(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """For each outcome accuracy and 95 % interval in per cent, and the number of points.

    Wilson's interval for shares, the normal one for the average.
    """
    from scipy.stats import binomtest

    rows: dict[str, dict[str, float]] = {}
    for name, outcome in evaluation.outcomes().items():
        values = outcome.double().numpy()
        n = len(values)
        if name == "average":
            half = 1.96 * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else 1.0
            low, high = max(values.mean() - half, 0.0), min(values.mean() + half, 1.0)
        else:
            interval = binomtest(int(values.sum()), n).proportion_ci(method="wilson")
            low, high = interval.low, interval.high
        accuracy, low, high = (round(100 * float(share), 2) for share in (values.mean(), low, high))
        rows[name] = {"accuracy": accuracy, "low": low, "high": high, "points": n}
    return rows


def evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    """eval.json's part that the attacks know (docs/evaluation.md says what each field is)."""
    norms = {}
    for threat, log in evaluation.logs.items():
        spent = log.passes.sum(0).tolist()
        norms[threat.norm] = {
            "eps": threat.eps,
            "runs": [
                {
                    "name": str(run),
                    "attacked": int((log.passes[:, r] > 0).sum()),
                    "broken": int((log.broken_by == r).sum()),
                    "forward_passes": spent[r],
                }
                for r, run in enumerate(log.runs)
            ],
            "broken_by_run": [None if r < 0 else r for r in log.broken_by.tolist()],
            "forward_passes": log.passes.sum(1).tolist(),
        }
    outcomes = {name: values for name, values in evaluation.outcomes().items() if name != "average"}
    curve = {"curve": {threat.norm: curve for threat, curve in evaluation.curve.items()}} if evaluation.curve else {}
    return {
        "accuracy": accuracy_table(evaluation),
        "warnings": evaluation.warnings,
        "norms": norms,
        "outcomes": {name: values.int().tolist() for name, values in outcomes.items()},
        **curve,
    }


def paired(ours: dict[str, list[int]], theirs: dict[str, list[int]]) -> dict[str, dict[str, float]]:
    """Differences of two evaluations' outcomes, 0 or 1 a point: ours minus theirs and the 95 % interval, in points of per cent.

    The interval is the normal one of the mean of the differences. Raises ValueError if the points differ in number.
    """
    rows = {}
    for name in ours:
        if name not in theirs:
            continue
        if len(ours[name]) != len(theirs[name]):
            raise ValueError(
                f"it has {len(theirs[name])} points, this evaluation {len(ours[name])}: a paired difference needs the same"
            )
        difference = np.array(ours[name], float) - np.array(theirs[name], float)
        n = len(difference)
        half = 1.96 * float(np.std(difference, ddof=1)) / n**0.5 if n > 1 else 1.0
        mean = float(difference.mean())
        rows[name] = {
            key: round(100 * value, 2)
            for key, value in (("difference", mean), ("low", mean - half), ("high", mean + half))
        }
    return rows


def robustbench_fields(content: dict[str, Any], norm: str) -> dict[str, Any]:
    """The fields of RobustBench's model_info/DATASET/NORM/ID.json; null where a person must fill them in."""
    settings, accuracy = content["settings"], content["accuracy"]
    eps = content["norms"][norm]["eps"]
    steps = round(eps * 255, 6)
    robust = f"{accuracy[norm]['accuracy']:.2f}"
    full = settings["attacks"] == "autoattack"
    return {
        "link": None,
        "name": settings["model_name"],
        "authors": None,
        "additional_data": None,
        "number_forward_passes": 1,
        "dataset": settings["dataset"],
        "venue": None,
        "architecture": None,
        "eps": f"{steps:.0f}/255" if norm == "Linf" and steps == round(steps) else f"{eps:g}",
        "clean_acc": f"{accuracy['clean']['accuracy']:.2f}",
        "reported": None,
        "autoattack_acc": robust if full else None,
        "footnote": f"{settings['n_ex']} test points"
        + ("" if full else f"; {robust} under the {settings['attacks']} attacks, not AutoAttack"),
    }
