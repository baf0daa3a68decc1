"""How much an evaluation spends on an example: which runs of which attacks, in what order."""

from __future__ import annotations

from dataclasses import dataclass

from .norms import NORMS

APGD_KINDS = ("CE", "T", "brief")
ATTACKS = ("standard", "fast", "autoattack")


@dataclass(frozen=True)
class AttackRun:
    """One run of an attack on an example: cross-entropy (CE, brief), to the `number`-th most likely other class (T), FAB-T or Square."""

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
        brief = [AttackRun("brief")] if spec.brief_first and self.attacks != "fast" else []
        more = [AttackRun("FAB-T"), AttackRun("Square")] if self.attacks == "autoattack" else []
        ce, targeted = range(restarts), range(1, targets + 1)
        return brief + [AttackRun("CE", r) for r in ce] + [AttackRun("T", t) for t in targeted] + more


STANDARD = AttackPlan()
