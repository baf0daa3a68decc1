"""What an evaluation finds: which examples broke by which run, accuracies with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .plan import AttackRun
from .threat import Threat

Z95 = 1.959963984540054  # 97.5 % of the normal distribution lie below


@dataclass(frozen=True)
class FinishedRun:
    """A run that is over: it broke the example, or made all its steps."""

    example: int
    run: int  # its number in AttackLog.runs
    passes: int  # forward passes
    broken: bool


@dataclass
class AttackLog:
    """What R runs in one threat model did to N examples."""

    runs: list[AttackRun]
    passes: Tensor  # (N, R) int32: forward passes that the run spent on the example; 0: it was not made
    broken_by: Tensor  # (N,) int64: number of the run that broke it; -1: none did

    @classmethod
    def empty(cls, runs: list[AttackRun], n: int) -> AttackLog:
        """Before any run on n examples."""
        return cls(runs, torch.zeros(n, len(runs), dtype=torch.int32), torch.full((n,), -1))

    @property
    def broken(self) -> Tensor:
        """(N,) bool."""
        return self.broken_by >= 0

    def next_run(self, example: int) -> int:
        """Number of the first run that was not made on the example."""
        return int((self.passes[example] > 0).sum())

    def add(self, finished: Sequence[FinishedRun]) -> None:
        """Note these runs."""
        for each in finished:
            self.passes[each.example, each.run] = each.passes
            if each.broken:
                self.broken_by[each.example] = each.run


@dataclass
class Evaluation:
    """Which of N examples are robust. Its print is a table: clean, each norm, average over the norms and union, in per cent."""

    clean: Tensor  # (N,) bool: right without an attack
    logs: dict[Threat, AttackLog] = field(default_factory=dict)
    union_only: bool = False  # examples broken in one norm were not attacked in others: only clean and union are known
    curve: dict[Threat, list[list[float]]] = field(default_factory=dict)  # [radius, accuracy in per cent], 0 to 2 eps
    warnings: list[str] = field(default_factory=list)  # why the figures should not be believed
    x_adv: dict[Threat, Tensor] = field(default_factory=dict)
    """(N, C, H, W) float32, in memory: the image that broke the example, the clean one where none did (robust_accuracy alone)."""

    def robust(self, threat: Threat) -> Tensor:
        """(N,) bool: right, and no attack in this threat model broke it."""
        return self.clean & ~self.logs[threat].broken

    @property
    def union(self) -> Tensor:
        """(N,) bool: right, and broken in no threat model."""
        return torch.stack([self.clean, *(self.robust(threat) for threat in self.logs)]).all(0)

    def outcomes(self) -> dict[str, Tensor]:
        """Per example (N,), in [0, 1]: clean, each norm, average over the norms, union; without the norms if union_only."""
        rows = {"clean": self.clean}
        if not self.logs:
            return rows
        if self.union_only:
            return rows | {"union": self.union}
        each_once = len({threat.norm for threat in self.logs}) == len(self.logs)
        norms = {threat.norm if each_once else str(threat): self.robust(threat) for threat in self.logs}
        average = torch.stack([robust.float() for robust in norms.values()]).mean(0)
        return rows | norms | {"average": average, "union": self.union}

    def accuracies(self) -> dict[str, dict[str, float]]:
        """For each outcome accuracy, its 95 % interval (low, high) in per cent, and the number of examples (points)."""
        rows: dict[str, dict[str, float]] = {}
        for name, outcome in self.outcomes().items():
            values = outcome.double()
            low, high = (
                normal_interval(values) if name == "average" else wilson_interval(int(values.sum()), len(values))
            )
            parts = {"accuracy": float(values.mean()), "low": low, "high": high}
            rows[name] = {key: round(100 * part, 2) for key, part in parts.items()} | {"points": len(values)}
        return rows

    def __str__(self) -> str:
        return "\n".join([table(self.accuracies()), *(f"WARNING: {warning}" for warning in self.warnings)])


def table(rows: dict[str, dict[str, float]], title: str = "") -> str:
    """Accuracy, 95 % interval and number of examples, a line each."""
    lines = [f"{title:<28}accuracy   95 % interval   images"]
    lines += [
        f"  {name:<26}{r['accuracy']:7.2f} %  [{r['low']:5.1f}, {r['high']:5.1f}]   {r['points']:6d}"
        for name, r in rows.items()
    ]
    return "\n".join(lines)


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a probability, from so many successes in n > 0 tries."""
    rate, spread = successes / n, Z95**2 / n
    middle = (rate + spread / 2) / (1 + spread)
    half = (spread * rate * (1 - rate) + spread**2 / 4) ** 0.5 / (1 + spread)
    return middle - half if successes else 0.0, middle + half if successes < n else 1.0


def normal_interval(values: Tensor) -> tuple[float, float]:
    """The normal 95 % interval, cut to [0, 1], of the mean of values (N,) in [0, 1]; all of it for one value."""
    mean, n = float(values.mean()), len(values)
    half = 1.96 * float(values.std()) / n**0.5 if n > 1 else 1.0
    return max(mean - half, 0.0), min(mean + half, 1.0)
