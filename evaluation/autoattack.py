"""pyautoattack's FAB-T and Square, the rest of AutoAttack after APGD-CE and APGD-T (--attacks=autoattack)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from attacks.apgd import Model
from attacks.standard import OtherAttack
from attacks.threat import Threat


def library_attacks(seed: int, num_classes: int) -> dict[str, OtherAttack]:
    """The attacks by AttackRun.kind. Their starts depend on the batch."""
    return {kind: partial(_attack, kind=kind, seed=seed, num_classes=num_classes) for kind in ("FAB-T", "Square")}


def _attack(model: Model, x: Tensor, y: Tensor, threat: Threat, kind: str, seed: int, num_classes: int) -> Tensor:
    """x_adv (B, ...) of one of them; x where it found nothing."""
    from pyautoattack import AutoAttack

    attack = AutoAttack(model, norm=threat.norm, eps=threat.eps, seed=seed, device=x.device)
    attack.attacks_to_run = [kind.lower()]
    attack.fab.n_target_classes = min(9, num_classes - 1)
    x_adv: Tensor = attack.run_standard_evaluation(x, y, batch_size=len(x))[0]
    return x_adv
