"""Robust accuracy for each norm and their union: every run of the attack on the points that still stand, no pass more.

Each point goes through its runs until one step breaks it. The batch in work is kept full: a row that is done makes room for the next
point, or for the same point's next run. What is finished is in a journal, so an evaluation can stop and go on, in any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from attacks.apgd import Model
from attacks.threat import Threat
from evaluation.checks import network_warnings, result_warnings
from evaluation.curve import above, accuracy_curve, below
from evaluation.results import AttackLog, AttackRun, Evaluation, runs_for
from evaluation.storage import ImageFile, Journal
from evaluation.threat_evaluator import AttackPlan, Points, ThreatEvaluator, image_path
from utils.distributed import barrier

STANDARD = AttackPlan()


def evaluate(
    model: Model,
    points: Points,
    threats: Sequence[Threat],
    device: torch.device,
    plan: AttackPlan = STANDARD,
    batch_size: int = 250,
    seed: int = 0,
    folder: Path | None = None,
    share: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> Evaluation:
    """Attack the points that are right, in each threat model.

    The model is on `device`, in eval mode, its parameters frozen. Random starts depend on (seed, point, run, norm) alone, so the figures
    don't depend on batch size, order or number of processes, up to the rounding of the network's kernels. With a folder, the images that
    broke points are in its adv_THREAT.npy (clean ones elsewhere), and what its journal says is done is not done again. share is
    (rank, number) of this process: each takes its part of the points, all return the whole. Images outside ball or box don't count and
    are warned of. The folder's journal must be of the same network, points, threats, plan and seed.
    """
    rank, number = share
    journal = Journal(folder, rank)
    mine = torch.arange(rank, len(points), number)
    ranked, found = _clean(model, points, mine, device, batch_size, journal)
    barrier()
    logs = {
        t: _empty(len(points), runs_for(plan.attacks, t.norm, ranked.shape[1], plan.n_restarts, plan.n_targets))
        for t in threats
    }
    clean = _replay(journal, len(points), logs)
    works = {}
    for threat in threats:
        path = image_path(folder, threat) if folder else None
        if path and rank == 0:
            ImageFile.make(path, len(points), points.x)
        barrier()
        images = ImageFile(path) if path else None
        works[threat] = ThreatEvaluator(
            model, points, ranked, threat, logs[threat], plan, seed, device, journal, images
        )
    standing = clean & ~torch.stack([torch.zeros_like(clean), *(log.broken for log in logs.values())]).any(0)
    # For the union the first runs of all norms go before the rest: they break most of what breaks, L1's brief one at the least cost.
    for first_alone in (True, False) if plan.union_only else (False,):
        for threat in sorted(threats, key=lambda t: t.norm != "L1") if plan.union_only else threats:
            left = standing if plan.union_only else clean
            chosen = [i for i in mine.tolist() if left[i]]
            works[threat].run_apgd(chosen, batch_size, progress and rank == 0, first_alone)
            if plan.attacks == "autoattack" and not first_alone:
                works[threat].run_library(chosen, batch_size)
            standing &= ~logs[threat].broken
    curve: dict[Threat, AttackLog] = {}
    for threat in threats if plan.curve else ():
        # A point that stands at eps stands below; one that broke at a radius is broken above it.
        smaller, larger = below(threat), above(threat)
        for radii, pending in ((smaller, clean & logs[threat].broken), (larger, clean & ~logs[threat].broken)):
            for radius in radii:
                curve[radius] = _empty(len(points), [AttackRun("CE")])
                _replay(journal, len(points), {radius: curve[radius]})
                work = ThreatEvaluator(model, points, ranked, radius, curve[radius], plan, seed, device, journal, None)
                work.run_apgd([i for i in mine.tolist() if pending[i]], batch_size, progress and rank == 0)
                pending = pending & ~curve[radius].broken
    barrier()
    clean = _replay(journal, len(points), logs | curve)  # with the other processes' part
    evaluation = Evaluation(clean, logs, plan.union_only, warnings=found)
    if plan.curve:
        evaluation.curve = {threat: accuracy_curve(evaluation, threat, curve) for threat in threats}
    evaluation.warnings += result_warnings(evaluation)
    return evaluation


def _clean(
    model: Model, points: Points, mine: Tensor, device: torch.device, batch_size: int, journal: Journal
) -> tuple[Tensor, list[str]]:
    """Classes by falling logit, (N, K) with this process' rows filled, and warnings; the journal gets which are right."""
    known = {record["point"] for record in journal.records() if record["task"] == "clean"}
    ranked = torch.zeros(len(points), 0, dtype=torch.int16)
    found: list[str] = []
    for number, index in enumerate(mine.split(batch_size)):
        x = points.x(index).to(device)
        with torch.no_grad():
            logits = model(x).float().cpu()
        if number == 0:
            ranked = torch.zeros(len(points), logits.shape[1], dtype=torch.int16)
            if len(index):  # with more processes than points, some have none
                found = network_warnings(model, x[:100], points.y[index[:100]].to(device))
        ranked[index] = logits.argsort(dim=1, descending=True).to(torch.int16)
        right = (ranked[index, 0] == points.y[index]).tolist()
        journal.add(
            [
                {"task": "clean", "point": i, "right": r}
                for i, r in zip(index.tolist(), right, strict=True)
                if i not in known
            ]
        )
    return ranked, found


def _empty(n: int, runs: list[AttackRun]) -> AttackLog:
    return AttackLog(runs, torch.zeros(n, len(runs), dtype=torch.int32), torch.full((n,), -1))


def _replay(journal: Journal, n: int, logs: dict[Threat, AttackLog]) -> Tensor:
    """Fill the logs with all that the journal knows; which points are right, (N,) bool."""
    clean = torch.zeros(n, dtype=torch.bool)
    by_name = {str(threat): log for threat, log in logs.items()}
    for record in journal.records():
        point = record["point"]
        if record["task"] == "clean":
            clean[point] = record["right"]
        else:
            if record["task"] not in by_name:
                continue  # another radius of the curve
            log = by_name[record["task"]]
            log.passes[point, record["run"]] = record["passes"]
            if record["broken"]:
                log.broken_by[point] = record["run"]
    return clean
