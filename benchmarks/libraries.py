"""APGD of other libraries with one signature, for the comparisons in speed.py. Each gives the points (B, ...) that it returns."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from attacks.threat import Threat

# `make bench` puts them here, behind everything else on the path: one of them brings a `robustbench` of its own.
sys.path.append(str(Path(__file__).parents[1] / ".venv" / "libraries"))
sys.modules.setdefault("visdom", ModuleType("visdom"))  # adv-lib imports it and needs it for plots alone

Attack = Callable[[nn.Module, Tensor, Tensor, Threat, int], Tensor]
ORDER = {"Linf": float("inf"), "L2": 2.0, "L1": 1.0}


def adv_lib(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, n_iter: int) -> Tensor:
    """The points of highest loss, of one run: its public function makes 100 steps where it is asked for those, whatever n_iter is."""
    from adv_lib.attacks.auto_pgd import _apgd

    eps = torch.full((len(x),), threat.eps, device=x.device)
    found: Tensor = _apgd(model, x, y, eps, ORDER[threat.norm], n_iter=n_iter, loss_function="ce")[0]
    return found


def pyautoattack(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, n_iter: int) -> Tensor:
    """The points of highest loss."""
    from pyautoattack.autopgd_base import APGDAttack

    attack = APGDAttack(model, n_iter, threat.norm, eps=threat.eps, seed=0, loss="ce", device=x.device)
    attack.init_hyperparam(x)
    found: Tensor = attack.attack_single_run(x, y)[0]
    return found


def torchattacks(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, n_iter: int) -> Tensor:
    """The last point that was misclassified, where there is one, else the image."""
    from torchattacks import APGD

    found: Tensor = APGD(model, norm=threat.norm, eps=threat.eps, steps=n_iter)(x, y)
    return found


def art(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, n_iter: int) -> Tensor:
    """The Adversarial Robustness Toolbox' points of highest loss among those misclassified."""
    from art.attacks.evasion import AutoProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    classes = int(model(x[:1]).shape[1])
    wrapped = PyTorchClassifier(model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0.0, 1.0))
    attack = AutoProjectedGradientDescent(
        wrapped,
        norm=np.inf if threat.norm == "Linf" else int(ORDER[threat.norm]),
        eps=threat.eps,
        eps_step=2 * threat.eps,
        max_iter=n_iter,
        nb_random_init=1,
        batch_size=len(x),
        loss_type="cross_entropy",
        verbose=False,
    )
    return torch.from_numpy(attack.generate(x.numpy(), nn.functional.one_hot(y, classes).numpy()))


ATTACKS: dict[str, Attack] = {
    "adv-lib": adv_lib,
    "pyautoattack": pyautoattack,
    "torchattacks": torchattacks,
    "ART": art,
}
PACKAGES = ("adv-lib", "pyautoattack", "torchattacks", "adversarial-robustness-toolbox")
NORMS_OF = {name: ("Linf", "L2") if name == "torchattacks" else ("Linf", "L2", "L1") for name in ATTACKS}
