"""Robust accuracy for each norm and their union, stored while it is found: it can stop and go on, in any number of processes.

The attacks are those of attacks/standard.py. Here is where the runs that finish are kept, what other processes found, and the curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attacks.apgd import Model
from attacks.checks import result_warnings
from attacks.network import CleanAnswers, Examples, Network, clean_answers
from attacks.results import STANDARD, AttackLog, AttackPlan, Evaluation
from attacks.standard import EvaluationContext, OtherAttack, make_runs
from attacks.threat import Threat
from evaluation.curve import CurveRadii, accuracy_curve, curve_logs, curve_warnings, make_curve_runs
from evaluation.storage import FOUND, Store, by_key
from utils.checkpoint import fingerprint, tensors_fingerprint
from utils.distributed import ALONE, Process, all_gather
from utils.precision import Amp, autocast_model, with_cast_weights


@dataclass(frozen=True)
class EvaluationOptions:
    """How an evaluation is carried out. The figures depend on none of it, up to the rounding of the network's kernels and of amp."""

    process: Process = ALONE  # example i is attacked by process i % world_size, on its device
    batch_size: int = 250  # images attacked at once
    amp: Amp = "off"  # format of the attack's passes; what they break is judged again in float32
    curve: CurveRadii = field(default_factory=dict)  # also one APGD-CE at each of these radii
    progress: bool = True  # a bar on stderr


HERE = EvaluationOptions()


def evaluate(
    model: Model,
    examples: Examples,
    threats: Sequence[Threat],
    plan: AttackPlan = STANDARD,
    options: EvaluationOptions = HERE,
    folder: Path | None = None,
) -> Evaluation:
    """Attack the examples that are right, in each threat model; every process returns the whole.

    The model is on the process' device, in eval mode, its parameters without gradient. With a folder, the images that broke examples are
    in its adv_THREAT.npy (clean ones elsewhere), each is read back and judged again, and what its states say is done is not done again:
    they must be of the same network, examples, threats, plan, amp and curve. Images outside ball or box do not count and are warned of.
    Raises UsageError for a folder with a state of another evaluation, NetworkError for a network that fails; what was found is kept.
    """
    device, rank, n = options.process.device, options.process.rank, len(examples)
    attack_model = None if options.amp == "off" else _low_precision(model, device, options.amp)
    network = Network(model, device, options.batch_size, attack_model)
    mine = torch.arange(rank, n, options.process.world_size)
    answers = clean_answers(network, examples, mine)
    with Store(folder, rank, options.progress and rank == 0) as store:
        others = library_attacks(plan.seed, answers.ranking.shape[1])
        context = EvaluationContext(network, examples, answers.ranking, plan, store, others)
        logs = {threat: context.empty_log(threat) for threat in threats}
        curve = curve_logs(options.curve, n)
        store.begin(identity(context, logs, curve, options.amp), logs | curve, examples, threats if folder else ())
        answers.warnings += make_verified_runs(context, logs, answers.right, store, mine)
        make_curve_runs(context, options.curve, logs, curve, answers.right)
    gather(mine, answers, logs | curve)
    evaluation = Evaluation(answers.right, logs, plan, warnings=answers.warnings)
    evaluation.clean_not_finite, evaluation.num_classes = answers.not_finite, answers.ranking.shape[1]
    evaluation.warnings += curve_warnings(options.curve, curve)
    evaluation.curve = {
        threat: accuracy_curve(evaluation, threat, others, curve) for threat, others in options.curve.items()
    }
    evaluation.warnings += result_warnings(evaluation)
    return evaluation


def _low_precision(model: Model, device: torch.device, amp: Amp) -> Model:
    """The network that is attacked with --amp."""
    if isinstance(model, nn.Module) and device.type != "cpu":  # a CPU has no kernels to launch
        model = with_cast_weights(model, amp)
    return autocast_model(model, device, amp)


def identity(
    context: EvaluationContext, logs: Mapping[Threat, AttackLog], curve: Mapping[Threat, AttackLog], amp: Amp
) -> dict[str, Any]:
    """What must be the same to go on: network, images, settings by their flags' names, runs. Not the device or the batch size."""
    model, examples = context.network.model, context.examples
    return asdict(context.plan) | {
        "network": fingerprint(model) if isinstance(model, nn.Module) else "a function",
        "images": [examples.levels, tensors_fingerprint(examples.images, examples.y)],
        "l_norms": [threat.norm for threat in logs],
        "l_eps": [threat.eps for threat in logs],
        "amp": amp,
        "curve": list(by_key(curve)),
        "runs": [f"{threat}: {run}" for threat, log in logs.items() for run in log.runs],
    }


def make_verified_runs(
    context: EvaluationContext, logs: Mapping[Threat, AttackLog], chosen: Tensor, store: Store, mine: Tensor
) -> list[str]:
    """`make_runs`, then read the images back that broke examples, and judge them again in float32; warnings.

    Examples whose image fails that are attacked again, once; those that fail once more count as not broken, and are warned of.
    """
    failures = dict.fromkeys(store.images, 0)
    for again in (True, False):
        make_runs(context, logs, chosen)
        for threat in store.images:
            failed, counts = store.verify(context.network, context.examples, threat, mine), logs[threat].counts
            store.reset(threat, failed, context.examples, again)
            store.restore_clean(threat, mine, context.examples)
            failures[threat] = len(failed)
            counts["images_verified"] = int(logs[threat].broken[mine].sum())
            counts["images_attacked_again"] = counts.get("images_attacked_again", 0) + again * len(failed)
        if not any(failures.values()):
            return []
    text = "images that broke the network did not when read back from their file, twice: they count as not broken"
    return [f"{threat}: {number} {text}" for threat, number in failures.items() if number]


def gather(mine: Tensor, answers: CleanAnswers, logs: Mapping[Threat, AttackLog]) -> None:
    """Put every process' part, its examples `mine`, into the clean answers and the logs; with all warnings and the sums of counts."""
    ours = [([getattr(log, name)[mine] for name in FOUND], log.counts) for log in logs.values()]
    parts = all_gather((mine, answers.right[mine], answers.not_finite[mine], ours, answers.warnings))
    for log in logs.values():
        log.counts = {}
    for index, right, odd, theirs, _ in parts:
        answers.right[index], answers.not_finite[index] = right, odd
        for log, (found, counts) in zip(logs.values(), theirs, strict=True):
            for name, value in zip(FOUND, found, strict=True):
                getattr(log, name)[index] = value
            for name, count in counts.items():
                log.counts[name] = log.counts.get(name, 0) + count
    answers.warnings = list(dict.fromkeys(warning for *_, found in parts for warning in found))


def library_attacks(seed: int, num_classes: int) -> dict[str, OtherAttack]:
    """FAB-T and Square of pyautoattack, the rest of AutoAttack (--attacks=autoattack). Their starts depend on the batch."""

    def attack(name: str, model: Model, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
        from pyautoattack import AutoAttack

        library = AutoAttack(model, norm=threat.norm, eps=threat.eps, seed=seed, device=x.device)
        library.attacks_to_run = [name.lower()]
        library.fab.n_target_classes = min(9, num_classes - 1)
        x_adv: Tensor = library.run_standard_evaluation(x, y, batch_size=len(x))[0]
        return x_adv

    return {name: partial(attack, name) for name in ("FAB-T", "Square")}
