"""An evaluation's runs: the plan, which is what is spent on an example; the log of what they did; the accuracies and their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .norms import NORMS
from .threat import Threat

Z95 = 1.959963984540054  # 97.5 % of the normal distribution lie below
APGD_KINDS = ("CE", "T", "brief")
ATTACKS = ("standard", "fast", "autoattack")


@dataclass(frozen=True)
class AttackRun:
    """One run of an attack on an example: cross-entropy (CE, brief), to the `number`-th most likely other class (T), FAB-T or Square."""

    kind: str
    number: int = 0  # of the restart, from 0, or of the target, from 1

    def __str__(self) -> str:
        names = {
            "CE": f"APGD-CE restart {self.number + 1}",
            "T": f"APGD-T target {self.number}",
            "brief": "APGD-CE, one radius, a fifth of the steps",
        }
        return names.get(self.kind, self.kind)


@dataclass(frozen=True)
class AttackPlan:
    """How much is spent on an example: the attacks by name (see `runs`), steps of a run, and the number of its kinds."""

    attacks: str = "standard"
    n_iter: int = 100
    n_restarts: int | None = None
    n_targets: int | None = None
    union_only: bool = False  # an example broken under one norm is not attacked under the others
    seed: int = 0  # of the random starts

    def runs(self, norm: str, num_classes: int) -> list[AttackRun]:
        """The runs on each example not yet broken, in turn. Raises ValueError for attacks that are unknown or not made for the norm.

        standard: APGD-CE and APGD-T, 10 in all, 1 restart + 9 targets for Linf and L2, 5 + 5 for L1 (arXiv 2105.12508, section 5), where
        a brief run at the radius itself comes first: runs of three radii can break an example in their last 40 % alone, this one breaks
        most of what breaks within a few steps. fast: one APGD-CE; autoattack: standard, then FAB-T and Square. n_restarts and n_targets
        change the numbers; there are at most num_classes - 1 targets.
        """
        spec = NORMS[norm]
        if self.attacks not in ATTACKS:
            raise ValueError(f"unknown attacks {self.attacks!r}; choose one of {' '.join(ATTACKS)}")
        if self.attacks == "autoattack" and not spec.pyautoattack:
            raise ValueError(
                f"pyautoattack, whose FAB-T and Square autoattack adds, knows no norm {norm}; take standard"
            )
        restarts, targets = (1, 0) if self.attacks == "fast" else spec.restarts
        restarts = restarts if self.n_restarts is None else self.n_restarts
        targets = min(targets if self.n_targets is None else self.n_targets, num_classes - 1)
        runs = [AttackRun("brief")] if spec.brief_first and self.attacks != "fast" else []
        runs += [AttackRun("CE", number) for number in range(restarts)]
        runs += [AttackRun("T", number) for number in range(1, targets + 1)]
        return runs + ([AttackRun("FAB-T"), AttackRun("Square")] if self.attacks == "autoattack" else [])


STANDARD = AttackPlan()


@dataclass(order=True)
class Attempt:
    """One run on one example: waiting, being made, or over."""

    run: int  # its number in AttackLog.runs
    example: int
    passes: int = 0  # forward passes so far
    broken: bool = False


@dataclass
class AttackLog:
    """What R runs in one threat model did to N examples."""

    runs: list[AttackRun]
    passes: Tensor  # (N, R) int32: forward passes that the run spent on the example; 0: it was not made
    broken_by: Tensor  # (N,) int64: number of the run that broke it; -1: none did
    counts: dict[str, int] = field(
        default_factory=dict
    )  # what else was counted, by name: stored, and summed over processes

    @classmethod
    def empty(cls, runs: list[AttackRun], n: int) -> AttackLog:
        """Before any run on n examples."""
        return cls(runs, torch.zeros(n, len(runs), dtype=torch.int32), torch.full((n,), -1))

    @property
    def broken(self) -> Tensor:
        """(N,) bool."""
        return self.broken_by >= 0

    @property
    def next_run(self) -> Tensor:
        """(N,) int64: number of the first run that was not made on the example."""
        return (self.passes > 0).sum(1)

    def add(self, finished: Sequence[Attempt]) -> None:
        """Note attempts that are over."""
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
            interval = normal_interval(values) if name == "average" else wilson_interval(int(values.sum()), len(values))
            parts = zip(("accuracy", "low", "high"), (float(values.mean()), *interval), strict=True)
            rows[name] = {key: round(100 * part, 2) for key, part in parts} | {"points": len(values)}
        return rows

    def __str__(self) -> str:
        return "\n".join([table(self.accuracies()), *(f"WARNING: {warning}" for warning in self.warnings)])


def table(rows: dict[str, dict[str, float]], title: str = "") -> str:
    """Accuracy, 95 % interval and number of examples, a line each."""
    lines = [f"{title:<28}accuracy   95 % interval   images"]
    for name, row in rows.items():
        figures = f"{row['accuracy']:7.2f} %  [{row['low']:5.1f}, {row['high']:5.1f}]   {row['points']:6d}"
        lines.append(f"  {name:<26}{figures}")
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
