"""Reasons not to believe a robust accuracy, in the manner of AutoAttack's own checks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .apgd import Model
from .losses import cross_entropy
from .results import Evaluation


def network_warnings(model: Model, x: Tensor, y: Tensor) -> list[str]:
    """What is wrong with the network's logits of x (B, ...), y (B,), all on its device. Costs two forward and one backward passes."""
    network = model if isinstance(model, nn.Module) else nn.Module().eval()  # a function has no state to look at
    before = [value.clone() for value in network.state_dict().values()]
    x = x.detach().requires_grad_(True)
    logits = model(x)
    with torch.no_grad():
        again = model(x)
    changed = any(not torch.equal(old, new) for old, new in zip(before, network.state_dict().values(), strict=True))
    flat = _flat_fraction(logits, x, y)
    logits, classes, few = logits.detach(), logits.shape[1], logits.shape[1] < 4
    differs = not torch.allclose(logits, again, rtol=1e-3, atol=1e-4 * float(logits.abs().max()))
    sums = logits.float().sum(1)
    trains = changed or any(module.training for module in network.modules())
    probabilities = ((logits >= 0) & (logits <= 1)).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
    found = {
        "the network's outputs are random: two passes on the same images differ, and the gradient of one pass misleads the attack; "
        "attack the mean of many passes instead": differs,
        "the network's outputs look like probabilities: a softmax hides gradients, return the logits": probabilities,
        f"{classes} classes: the targeted DLR loss needs four, so the difference of two logits takes its place in APGD-T": few,
        "the network is in train mode or changes while it is evaluated: its answer depends on the batch": trains,
        f"the gradient of the cross-entropy is zero at {100 * flat:.0f} % of the images looked at: APGD cannot move there; "
        "--attacks=autoattack adds Square, which needs no gradient": flat > 0.05,
    }
    return [warning for warning, deserved in found.items() if deserved]


def result_warnings(evaluation: Evaluation) -> list[str]:
    """Runs that were too few: the last APGD run of a norm still broke more than 1 % of the examples, and more than one."""
    found = []
    for threat, log in evaluation.logs.items():
        apgd = [number for number, run in enumerate(log.runs) if run.kind in ("CE", "T")]
        broken = int((log.broken_by == apgd[-1]).sum()) if len(apgd) > 1 else 0
        if broken > max(1, len(evaluation.clean) / 100):
            last = f"{threat}: the last of {len(apgd)} runs still broke {broken} images"
            found.append(f"{last}; give it more (--n_restarts, --n_targets, --n_iter)")
    return found


def _flat_fraction(logits: Tensor, x: Tensor, y: Tensor) -> float:
    """The part of the images that are classified right at which the cross-entropy has no gradient."""
    right = logits.argmax(1) == y
    if not (logits.requires_grad and bool(right.any())):
        return float(not logits.requires_grad)
    grad = torch.autograd.grad(cross_entropy(logits.float(), y).sum(), x)[0].flatten(1)[right]
    return float((grad == 0).all(1).float().mean())
