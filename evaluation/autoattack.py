"""pyautoattack's FAB-T and Square, the rest of AutoAttack after APGD-CE and APGD-T (--attacks=autoattack)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attacks.apgd import Model
from attacks.evaluator import OtherAttack
from attacks.threat import Threat


@dataclass(frozen=True)
class LibraryAttack:
    """One of its attacks, by its name there in upper or lower case. Its starts depend on the batch."""

    name: str
    seed: int
    num_classes: int

    def __call__(self, model: Model, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
        """x_adv (B, ...); x where it found nothing."""
        from pyautoattack import AutoAttack

        attack = AutoAttack(model, norm=threat.norm, eps=threat.eps, seed=self.seed, device=x.device)
        attack.attacks_to_run = [self.name.lower()]
        attack.fab.n_target_classes = min(9, self.num_classes - 1)
        x_adv: Tensor = attack.run_standard_evaluation(x, y, batch_size=len(x))[0]
        return x_adv


def library_attacks(seed: int, num_classes: int) -> dict[str, OtherAttack]:
    """The attacks that `autoattack` adds, by AttackRun.kind."""
    return {name: LibraryAttack(name, seed, num_classes) for name in ("FAB-T", "Square")}
