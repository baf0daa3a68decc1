"""Reasons not to believe an accuracy, in the manner of AutoAttack's own checks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .apgd import Model
from .losses import cross_entropy
from .results import Evaluation, wilson_interval

LATE = 0.3, 0.75  # of a run's steps: few break an example later, with one radius and with three
CLOSE, MANY = 0.02, 0.05  # a margin near zero; so large a part of the images is many


def network_warnings(model: Model, x: Tensor, y: Tensor) -> list[str]:
    """What is wrong with the network's logits of x (B, ...), y (B,), all on its device. Costs two forward and one backward passes."""
    network = model if isinstance(model, nn.Module) else nn.Module().eval()  # a function has no state to look at
    before = [value.clone() for value in network.state_dict().values()]
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = model(x.clone())
    with torch.no_grad():
        again = _finite_part(model(x.clone()))
    changed = any(not torch.equal(old, new) for old, new in zip(before, network.state_dict().values(), strict=True))
    flat = _flat_fraction(logits, x, y)
    logits, classes, few = _finite_part(logits.detach()), logits.shape[1], logits.shape[1] < 4
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
    """Figures that should not be believed: no better than chance, logits or gradients that were not finite, runs that were too few."""
    found = [*_chance_warnings(evaluation), *_not_finite_warnings(evaluation), *_early_stop_warnings(evaluation)]
    for threat, log in evaluation.logs.items():
        apgd = [number for number, run in enumerate(log.runs) if run.kind in ("CE", "T")]
        broken = int((log.broken_by == apgd[-1]).sum()) if len(apgd) > 1 else 0
        if broken > max(1, len(evaluation.clean) / 100):
            last = f"{threat}: the last of {len(apgd)} runs still broke {broken} images"
            found.append(f"{last}; give it more (--n_restarts, --n_targets, --n_iter)")
    return found


def _early_stop_warnings(evaluation: Evaluation) -> list[str]:
    """Reasons not to believe that what was dropped was hopeless: many examples broken late, or standing with a margin near zero."""
    found: list[str] = []
    for threat, log in evaluation.logs.items() if evaluation.plan.early_stop else ():
        full = torch.tensor([not run.scout and run.kind != "brief" for run in log.runs])
        passes = (log.passes * full).gather(1, log.broken_by.clamp(min=0)[:, None])[:, 0]
        late = int((log.broken & (passes > LATE[threat.spec.brief_first] * evaluation.plan.n_iter)).sum())
        reach = log.reach.masked_fill(~full, float("-inf")).amax(1)
        near = int((evaluation.robust(threat) & (reach > -CLOSE)).sum())
        enough = max(2.0, MANY * len(evaluation.clean))
        told = [f"{late} images were broken late in a run"] if late > enough else []
        told += [f"{near} that stand were nearly broken"] if near > enough else []
        if told:
            found.append(
                f"{threat}: {' and '.join(told)}, so runs may have been dropped too early; use --attacks=standard"
            )
    return found


def _chance_warnings(evaluation: Evaluation) -> list[str]:
    """Clean accuracy whose 95 % interval reaches down to that of guessing one of the classes."""
    right, n, classes = int(evaluation.clean.sum()), len(evaluation.clean), evaluation.num_classes
    if not classes or wilson_interval(right, n)[0] > 1 / classes:
        return []
    rate = f"clean accuracy, {100 * right / n:.1f} % of {n} images, is not clearly above chance, {100 / classes:.1f} %"
    return [
        f"{rate}. The usual reasons: the network expects another activation function, another normalisation of its input, another order of "
        "classes or of colour channels, another range of pixels or image size; or the weights are of another network or data set"
    ]


def _not_finite_warnings(evaluation: Evaluation) -> list[str]:
    """Infinite or NaN logits of clean images; the same, or such gradients, in an attack."""
    found = []
    if evaluation.clean_not_finite is not None and (n := int(evaluation.clean_not_finite.sum())):
        wrong = int((evaluation.clean_not_finite & ~evaluation.clean).sum())
        found.append(f"the logits of {n} clean images are infinite or NaN; {wrong} of them count as wrong")
    for threat, log in evaluation.logs.items():
        if n := int(log.not_finite.sum()):
            robust = int((log.not_finite & evaluation.robust(threat)).sum())
            found.append(
                f"{threat}: logits or gradients were infinite or NaN at {n} of the images attacked, {robust} of which count as robust: the "
                "attack cannot search there, the accuracy may be far too high; --attacks=autoattack adds Square, which needs no gradient"
            )
    return found


def _finite_part(logits: Tensor) -> Tensor:
    """0 in place of what is NaN or infinite."""
    return logits.nan_to_num(0, 0, 0)


def _flat_fraction(logits: Tensor, x: Tensor, y: Tensor) -> float:
    """The part of the images that are classified right at which the cross-entropy has no gradient."""
    right = logits.argmax(1) == y
    if not (logits.requires_grad and bool(right.any())):
        return float(not logits.requires_grad)
    grad = torch.autograd.grad(cross_entropy(logits.float(), y).sum(), x, allow_unused=True)[0]
    return 1.0 if grad is None else float((grad.flatten(1)[right] == 0).all(1).float().mean())
