"""The standard evaluation in memory: APGD-CE and APGD-T in each threat model, on the examples not yet broken, no pass more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .apgd import Model
from .checks import network_warnings, result_warnings
from .evaluator import EvaluationCallback, EvaluationContext, Examples, Network, ThreatEvaluator
from .results import STANDARD, AttackLog, AttackPlan, Evaluation
from .threat import Threat


def robust_accuracy(
    model: Model,
    x: Tensor,
    y: Tensor,
    threats: Sequence[Threat] | Mapping[str, float],
    plan: AttackPlan = STANDARD,
    batch_size: int = 250,
) -> Evaluation:
    """Clean and robust accuracy in each threat model, and in their union; print it. All in memory, in this process.

    model: (B, C, H, W) in [0, 1] -> logits (B, K), in eval mode. x (N, C, H, W): floats in [0, 1] or uint8 from 0 to 255, y (N,), on any
    device; batches go to that of the model's parameters. threats: such as [Threat("Linf", 8 / 255), Threat("L1", 12)], or radii by norm.
    The figures depend on plan.seed, not on batch_size, up to the rounding of the network's kernels. Raises ValueError for bad input.
    """
    threats = [Threat(*each) for each in threats.items()] if isinstance(threats, Mapping) else threats
    examples = _checked_examples(x, y)
    first = next(model.parameters(), x) if isinstance(model, nn.Module) else x
    network = Network(model, first.device, batch_size)
    ranking, found = rank_classes(network, examples, torch.arange(len(examples)))
    clean = ranking[:, 0] == examples.y
    x_adv = {threat: examples.x(torch.arange(len(examples))) for threat in threats}
    context = EvaluationContext(network, examples, ranking, plan, _KeepImages(x_adv))
    logs = {threat: context.empty_log(threat) for threat in threats}
    make_runs(context, logs, clean)
    evaluation = Evaluation(clean, logs, plan.union_only, warnings=found, x_adv=x_adv)
    evaluation.warnings += result_warnings(evaluation)
    return evaluation


def rank_classes(network: Network, examples: Examples, index: Tensor) -> tuple[Tensor, list[str]]:
    """Each example's classes by falling logit at the clean image, (N, K) int16, the rows `index` filled; what is wrong with the network."""
    ranking = torch.zeros(len(examples), 0, dtype=torch.int16)
    found: list[str] = []
    for number, part in enumerate(index.split(network.batch_size)):
        x = examples.x(part).to(network.device)
        with torch.no_grad():
            logits = network.model(x).float().cpu()
        if number == 0:
            ranking = torch.zeros(len(examples), logits.shape[1], dtype=torch.int16)
            if len(part):  # with more processes than examples, some have none
                found = network_warnings(network.model, x[:100], examples.y[part[:100]].to(network.device))
        ranking[part] = logits.argsort(dim=1, descending=True).to(torch.int16)
    return ranking, found


def make_runs(context: EvaluationContext, logs: Mapping[Threat, AttackLog], chosen: Tensor) -> None:
    """All the runs of each threat model's log that are left, on the examples chosen (N,) bool, which should be right when clean."""
    evaluators = {threat: ThreatEvaluator(context, threat, log) for threat, log in logs.items()}
    if not context.plan.union_only:
        for evaluator in evaluators.values():
            evaluator.run(chosen)
        return
    # For the union the first runs of all norms go before the rest: they break most of what breaks, a brief one at the least cost.
    order = sorted(logs, key=lambda threat: not threat.spec.brief_first)
    unbroken = chosen & ~torch.stack([torch.zeros_like(chosen), *(log.broken for log in logs.values())]).any(0)
    for first_only in (True, False):
        for threat in order:
            evaluators[threat].run(unbroken, first_only)
            unbroken = unbroken & ~logs[threat].broken


class _KeepImages(EvaluationCallback):
    """Puts the images that broke examples into x_adv, (N, C, H, W) of each threat model."""

    def __init__(self, x_adv: dict[Threat, Tensor]) -> None:
        self.x_adv = x_adv

    def broken(self, threat: Threat, examples: Sequence[int], x_adv: Tensor) -> None:
        self.x_adv[threat][list(examples)] = x_adv


def _checked_examples(x: Tensor, y: Tensor) -> Examples:
    """Raises ValueError unless x (N, ...) and y (N,) are images and labels."""
    if x.dim() < 2 or y.shape != x.shape[:1] or not len(y):
        raise ValueError(f"images (N, C, H, W) and labels (N,) are needed, got {tuple(x.shape)} and {tuple(y.shape)}")
    if y.is_floating_point() or not (x.is_floating_point() or x.dtype == torch.uint8):
        raise ValueError(f"images are floats or uint8 and labels whole numbers, got {x.dtype} and {y.dtype}")
    if x.is_floating_point() and not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(
            "pixels must be in [0, 1]; a network that takes normalised images has to normalise them itself"
        )
    return Examples(x.detach().cpu(), y.long().cpu(), 255 if x.dtype == torch.uint8 else 1)
