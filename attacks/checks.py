"""Reasons not to believe a robust accuracy, in the manner of AutoAttack's own checks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .apgd import Model
from .losses import cross_entropy
from .results import Evaluation


def network_warnings(model: Model, x: Tensor, y: Tensor) -> list[str]:
    """What is wrong with the network's logits of x (B, ...), y (B,), all on its device. Costs two forward and one backward passes."""
    before = _state(model)
    x = x.detach().requires_grad_(True)
    logits = model(x)
    with torch.no_grad():
        again = model(x)
    changed = any(not torch.equal(a, b) for a, b in zip(before, _state(model), strict=True))
    found = _logit_warnings(logits.detach(), again)
    if changed or _training(model):
        found.append("the network is in train mode or changes while it is evaluated: its answer depends on the batch")
    flat = _flat_fraction(logits, x, y)
    if flat > 0.05:
        found.append(
            f"the gradient of the cross-entropy is zero at {100 * flat:.0f} % of the points looked at: APGD cannot move there; "
            "--attacks=autoattack adds Square, which needs no gradient"
        )
    return found


def result_warnings(evaluation: Evaluation) -> list[str]:
    """Runs that were too few: the last APGD run of a norm still broke more than 1 % of the examples, and more than one."""
    found = []
    for threat, log in evaluation.logs.items():
        apgd = [r for r, run in enumerate(log.runs) if run.kind in ("CE", "T")]
        broken = int((log.broken_by == apgd[-1]).sum()) if len(apgd) > 1 else 0
        if broken > max(1, len(evaluation.clean) / 100):
            found.append(
                f"{threat}: the last of {len(apgd)} runs still broke {broken} points; give it more (--n_restarts, --n_targets, --n_iter)"
            )
    return found


def _logit_warnings(logits: Tensor, again: Tensor) -> list[str]:
    """What is wrong with logits (B, K) and those of a second pass."""
    found = []
    if not torch.allclose(logits, again, rtol=1e-3, atol=1e-4 * float(logits.abs().max())):
        found.append(
            "the network's outputs are random: two passes on the same images differ, and the gradient of one pass misleads the attack; "
            "attack the mean of many passes instead"
        )
    sums = logits.float().sum(1)
    if bool(((logits >= 0) & (logits <= 1)).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        found.append("the network's outputs look like probabilities: a softmax hides gradients, return the logits")
    if logits.shape[1] < 4:
        found.append(
            f"{logits.shape[1]} classes: the targeted DLR loss needs four, so the difference of two logits takes its place in APGD-T"
        )
    return found


def _flat_fraction(logits: Tensor, x: Tensor, y: Tensor) -> float:
    """The part of the images that are classified right at which the cross-entropy has no gradient."""
    right = logits.argmax(1) == y
    if not (logits.requires_grad and bool(right.any())):
        return float(not logits.requires_grad)
    grad = torch.autograd.grad(cross_entropy(logits.float(), y).sum(), x)[0].flatten(1)[right]
    return float((grad == 0).all(1).float().mean())


def _training(model: Model) -> bool:
    return isinstance(model, nn.Module) and any(module.training for module in model.modules())


def _state(model: Model) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()] if isinstance(model, nn.Module) else []
