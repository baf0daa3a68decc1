"""An evaluation's runs: the plan, which is what is spent on an example; the log of what they did; the accuracies and their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .early_stop import DEFAULT_EFFORT, EarlyStop
from .norms import NORMS
from .threat import Threat

Z95 = 1.959963984540054  # 97.5 % of the normal distribution lie below
APGD_KINDS = ("CE", "T", "brief")
ATTACKS = ("standard", "quick", "fast", "autoattack")


@dataclass(frozen=True)
class AttackRun:
    """One run of an attack on an example: cross-entropy (CE, brief), to the `number`-th most likely other class (T), FAB-T or Square."""

    kind: str
    number: int = 0  # of the restart, from 0, or of the target, from 1
    scout: bool = False  # in a fifth of the steps, to see whether the run itself is worth it

    def __str__(self) -> str:
        names = {
            "CE": f"APGD-CE restart {self.number + 1}",
            "T": f"APGD-T target {self.number}",
            "brief": "APGD-CE, one radius, a fifth of the steps",
        }
        return names.get(self.kind, self.kind) + (", a fifth of the steps" if self.scout else "")


@dataclass(frozen=True)
class AttackPlan:
    """How much is spent on an example: the attacks by name (see `runs`), steps of a run, and the number of its kinds."""

    attacks: str = "standard"
    n_iter: int = 100
    n_restarts: int | None = None
    n_targets: int | None = None
    union_only: bool = False  # an example broken under one norm is not attacked under the others
    seed: int = 0  # of the random starts
    effort: int = DEFAULT_EFFORT  # of quick, from 1 to 10

    @property
    def early_stop(self) -> EarlyStop | None:
        """What drops runs, or does not begin them; None if all are made in full."""
        return EarlyStop.of(self.effort) if self.attacks == "quick" else None

    @property
    def upper_bound(self) -> bool:
        """Is this so little that the accuracy should be called an upper bound?"""
        return self.attacks == "fast"

    def runs(self, norm: str, num_classes: int) -> list[AttackRun]:
        """The runs on each example not yet broken, in turn. Raises ValueError for attacks that are unknown or not made for the norm.

        standard: APGD-CE and APGD-T, 10 in all, 1 restart + 9 targets for Linf and L2, 5 + 5 for L1 (arXiv 2105.12508, section 5), where
        a brief run at the radius itself comes first: runs of three radii can break an example in their last 40 % alone, this one breaks
        most of what breaks within a few steps. quick: the same as far as `early_stop` lets them, in L1 after a scout for APGD-CE and each
        target. fast: one APGD-CE; autoattack: standard, then FAB-T and Square. n_restarts and n_targets change the numbers; there are at
        most num_classes - 1 targets.
        """
        spec = NORMS[norm]
        self._check(norm)
        restarts, targets = (1, 0) if self.attacks == "fast" else spec.restarts
        restarts = restarts if self.n_restarts is None else self.n_restarts
        targets = min(targets if self.n_targets is None else self.n_targets, num_classes - 1)
        aimed = [AttackRun("T", number) for number in range(1, targets + 1)]
        runs = [AttackRun("brief")] if spec.brief_first and self.attacks != "fast" else []
        if self.attacks == "quick" and spec.brief_first:
            runs += [replace(run, scout=True) for run in (AttackRun("CE"), *aimed)]
        runs += [AttackRun("CE", number) for number in range(restarts)] + aimed
        return runs + ([AttackRun("FAB-T"), AttackRun("Square")] if self.attacks == "autoattack" else [])

    def _check(self, norm: str) -> None:
        """Raises ValueError for attacks that are unknown or not made for the norm."""
        if self.attacks not in ATTACKS:
            raise ValueError(f"unknown attacks {self.attacks!r}; choose one of {' '.join(ATTACKS)}")
        if self.attacks == "autoattack" and not NORMS[norm].pyautoattack:
            raise ValueError(
                f"pyautoattack, whose FAB-T and Square autoattack adds, knows no norm {norm}; take standard"
            )


STANDARD = AttackPlan()


@dataclass(order=True)
class Attempt:
    """One run on one example: waiting, being made, or over."""

    run: int  # its number in AttackLog.runs
    example: int
    passes: int = 0  # forward passes so far
    broken: bool = False
    not_finite: bool = False  # was a logit or an entry of the gradient infinite or NaN at some step
    dropped: bool = False  # as hopeless
    reach: float = float("-inf")  # as in an AttackLog


@dataclass
class AttackLog:
    """What R runs in one threat model did to N examples."""

    runs: list[AttackRun]
    passes: Tensor  # (N, R) int32: forward passes that the run spent on the example; 0: it was not made
    broken_by: Tensor  # (N,) int64: number of the run that broke it; -1: none did
    not_finite: Tensor  # (N,) bool: a logit or an entry of the gradient was infinite or NaN at some step
    reach: Tensor
    """(N, R) float32: best margin that the run reached at the radius itself, of short ones what a full one may reach; -inf: not known."""
    counts: dict[str, int] = field(default_factory=dict)  # what else was counted: stored, and summed over processes

    @classmethod
    def empty(cls, runs: list[AttackRun], n: int) -> AttackLog:
        """Before any run on n examples."""
        passes, reach = torch.zeros(n, len(runs), dtype=torch.int32), torch.full((n, len(runs)), float("-inf"))
        return cls(runs, passes, torch.full((n,), -1), torch.zeros(n, dtype=torch.bool), reach)

    @property
    def broken(self) -> Tensor:
        """(N,) bool."""
        return self.broken_by >= 0

    @property
    def next_run(self) -> Tensor:
        """(N,) int64: number of the run after the last that was made on the example."""
        return ((self.passes > 0) * torch.arange(1, len(self.runs) + 1)).amax(1)

    def add(self, finished: Sequence[Attempt]) -> None:
        """Note attempts that are over."""
        for each in finished:
            self.passes[each.example, each.run] = each.passes
            if each.broken:
                self.broken_by[each.example] = each.run
            if each.not_finite:
                self.not_finite[each.example] = True
            if each.dropped:
                self.counts["runs_dropped"] = self.counts.get("runs_dropped", 0) + 1
            self.reach[each.example, each.run] = each.reach


@dataclass
class Evaluation:
    """Which of N examples are robust. Its print is a table: clean, each norm, average over the norms and union, in per cent."""

    clean: Tensor  # (N,) bool: right without an attack
    logs: dict[Threat, AttackLog] = field(default_factory=dict)
    plan: AttackPlan = STANDARD  # with union_only, examples broken in one norm are not attacked in others: only clean and union are known
    curve: dict[Threat, list[list[float]]] = field(default_factory=dict)  # [radius, accuracy in per cent], from 0 on
    warnings: list[str] = field(default_factory=list)  # why the figures should not be believed
    x_adv: dict[Threat, Tensor] = field(default_factory=dict)
    """(N, C, H, W) float32, in memory: the image that broke the example, the clean one where none did (robust_accuracy alone)."""
    num_classes: int | None = None
    clean_not_finite: Tensor | None = None  # (N,) bool: some logit of the clean image is infinite or NaN; None: nowhere

    def robust(self, threat: Threat) -> Tensor:
        """(N,) bool: right, and no attack in this threat model broke it."""
        return self.clean & ~self.logs[threat].broken

    @property
    def union(self) -> Tensor:
        """(N,) bool: right, and broken in no threat model."""
        return torch.stack([self.clean, *(self.robust(threat) for threat in self.logs)]).all(0)

    def outcomes(self) -> dict[str, Tensor]:
        """Per example (N,), in [0, 1]: clean, each norm, average over the norms, union; without the norms if the plan is union_only."""
        rows = {"clean": self.clean}
        if not self.logs:
            return rows
        if self.plan.union_only:
            return rows | {"union": self.union}
        norms = {name: self.robust(threat) for threat, name in self.names().items()}
        average = torch.stack([robust.float() for robust in norms.values()]).mean(0)
        return rows | norms | {"average": average, "union": self.union}

    def names(self) -> dict[Threat, str]:
        """What each threat model is called: its norm, with the radius if there are several of one norm."""
        each_once = len({threat.norm for threat in self.logs}) == len(self.logs)
        return {threat: threat.norm if each_once else str(threat) for threat in self.logs}

    def accuracies(self) -> dict[str, dict[str, float]]:
        """For each outcome accuracy, its 95 % interval (low, high) in per cent, and the number of examples (points).

        Where it is so: at how many examples logits or gradients were not finite (not_finite); upper_bound: True if the attacks are fast,
        or could not search at some of the examples that count as robust, since logits or gradients were not finite.
        """
        rows: dict[str, dict[str, float]] = {}
        not_finite = self.not_finite()
        for name, outcome in self.outcomes().items():
            values = outcome.double()
            ends = mean_interval(values) if name == "average" else wilson_interval(float(values.sum()), len(values))
            parts = zip(("accuracy", "low", "high"), (float(values.mean()), *ends), strict=True)
            rows[name] = {key: round(100 * part, 2) for key, part in parts} | {"points": len(values)}
            if bool(not_finite[name].any()):
                rows[name]["not_finite"] = int(not_finite[name].sum())
            if name != "clean" and (self.plan.upper_bound or bool((not_finite[name] & (values > 0)).any())):
                rows[name]["upper_bound"] = True
        return rows

    def not_finite(self) -> dict[str, Tensor]:
        """For each outcome (N,) bool: the examples at which logits or gradients were infinite or NaN, clean or attacked."""
        clean = torch.zeros_like(self.clean) if self.clean_not_finite is None else self.clean_not_finite
        norms = {name: clean | self.logs[threat].not_finite for threat, name in self.names().items()}
        anywhere = torch.stack([clean, *norms.values()]).any(0)
        return {"clean": clean} | norms | {"average": anywhere, "union": anywhere}

    def __str__(self) -> str:
        return "\n".join([table(self.accuracies()), *(f"WARNING: {warning}" for warning in self.warnings)])


def table(rows: dict[str, dict[str, float]], title: str = "") -> str:
    """Accuracy, 95 % interval, number of examples, and what makes a figure less than it looks, a line each."""
    lines = [f"{title:<28}accuracy   95 % interval   images"]
    for name, row in rows.items():
        figures = f"{row['accuracy']:7.2f} %  {interval(row)}   {row['points']:6d}"
        lines.append(f"  {name:<26}{'   '.join([figures, *remarks(row)])}")
    return "\n".join(lines)


def interval(row: dict[str, float]) -> str:
    """A row's interval, with one decimal, or two where it would look like a single number."""
    digits = 1 if row["high"] - row["low"] >= 0.1 else 2
    return f"[{row['low']:5.{digits}f}, {row['high']:5.{digits}f}]"


def remarks(row: dict[str, float]) -> list[str]:
    """What makes a row of `Evaluation.accuracies` less than it looks."""
    found = ["upper bound"] if row.get("upper_bound") else []
    return found + ([f"NOT FINITE at {row['not_finite']}"] if row.get("not_finite") else [])


def wilson_interval(successes: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a probability, from so many successes in n > 0 tries; neither need be a whole number."""
    rate, spread = successes / n, Z95**2 / n
    middle = (rate + spread / 2) / (1 + spread)
    half = (spread * rate * (1 - rate) + spread**2 / 4) ** 0.5 / (1 + spread)
    return middle - half if successes else 0.0, middle + half if successes < n else 1.0


def mean_interval(values: Tensor) -> tuple[float, float]:
    """The normal 95 % interval, cut to [0, 1], of the mean of values (N,) in [0, 1]; all of it for one value.

    It would be far too narrow near 0 and 1, a single number where all are equal: there it ends no earlier than Wilson's for 0 or N
    successes in N tries, and is Wilson's if all are equal, which is made for the values that vary most, 0 and 1.
    """
    mean, n = float(values.mean()), len(values)
    deviation = float(values.std()) if n > 1 else 0.0
    if n > 1 and not deviation:
        return wilson_interval(float(values.sum()), n)
    half = 1.96 * deviation / n**0.5 if n > 1 else 1.0
    return max(min(mean - half, wilson_interval(n, n)[0]), 0.0), min(max(mean + half, wilson_interval(0, n)[1]), 1.0)
