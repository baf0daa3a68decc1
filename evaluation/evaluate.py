"""Robust accuracy for each norm and their union, stored while it is found: it can stop and go on, in any number of processes.

The attacks are those of attacks/standard.py. Here is where the runs that finish are kept, what other processes found, and the curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from attacks.apgd import Model
from attacks.checks import result_warnings
from attacks.results import STANDARD, AttackPlan, Evaluation
from attacks.standard import EvaluationContext, Examples, Network, OtherAttack, make_runs, rank_classes
from attacks.threat import Threat
from evaluation.curve import accuracy_curve, curve_logs, make_curve_runs
from evaluation.storage import Store
from utils.distributed import Process, barrier
from utils.precision import Amp, autocast_model

ALONE = Process(torch.device("cpu"))


@dataclass(frozen=True)
class EvaluationOptions:
    """How an evaluation is carried out. The figures depend on none of it, up to the rounding of the network's kernels and of amp."""

    process: Process = ALONE  # example i is attacked by process i % world_size, on its device
    batch_size: int = 250  # images attacked at once
    amp: Amp = "off"  # format of the attack's passes; what they break is judged again in float32
    curve: bool = False  # also one APGD-CE at radii up to 2 eps
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

    The model is on the process' device, in eval mode, its parameters without gradient. With a folder, which several processes need,
    the images that broke examples are in its adv_THREAT.npy (clean ones elsewhere), and what its journal says is done is not done again:
    that must be of the same network, examples, threats, plan, amp and curve. Images outside ball or box do not count and are warned of.
    """
    device, rank, n = options.process.device, options.process.rank, len(examples)
    attack_model = None if options.amp == "off" else autocast_model(model, device, options.amp)
    network = Network(model, device, options.batch_size, attack_model)
    mine = torch.arange(rank, n, options.process.world_size)
    ranking, warnings = rank_classes(network, examples, mine)
    clean, chosen = torch.zeros(2, n, dtype=torch.bool)
    clean[mine] = ranking[mine, 0] == examples.y[mine]
    store = Store(folder, rank, threats, examples, options.progress and rank == 0)
    store.add_clean(mine, clean)
    context = EvaluationContext(network, examples, ranking, plan, store, library_attacks(plan.seed, ranking.shape[1]))
    logs = {threat: context.empty_log(threat) for threat in threats}
    curve = curve_logs(threats, n) if options.curve else {}
    store.replay(clean, logs | curve)
    chosen[mine] = clean[mine]
    make_runs(context, logs, chosen)
    if curve:
        make_curve_runs(context, logs, curve, chosen)
    barrier()
    store.replay(clean, logs | curve)  # with the other processes' part
    evaluation = Evaluation(clean, logs, plan.union_only, warnings=warnings)
    if curve:
        evaluation.curve = {threat: accuracy_curve(evaluation, threat, curve) for threat in threats}
    evaluation.warnings += result_warnings(evaluation)
    return evaluation


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
