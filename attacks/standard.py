"""Robust accuracy for each norm and their union: attacks in turn, each on the points that still stand."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attacks.apgd import Model, apgd, apgd_shrinking
from attacks.losses import cross_entropy, dlr_targeted, margin_targeted
from attacks.threat import NORMS, Norm, Threat
from utils.run import save_images, write_json
from utils.training import generator


@dataclass(frozen=True)
class Run:
    """One restart of APGD: on the cross-entropy, or towards the `number`-th most likely other class."""

    targeted: bool
    number: int  # of the restart, from 0, or of the target, from 1

    def __str__(self) -> str:
        return f"APGD-T target {self.number}" if self.targeted else f"APGD-CE restart {self.number + 1}"


def standard_runs(norm: Norm, num_classes: int) -> list[Run]:
    """APGD-CE and APGD-T, 10 in all: 1 restart + 9 targets for Linf and L2, 5 + 5 for L1; fewer targets where there are fewer classes."""
    restarts, targets = (5, 5) if norm == "L1" else (1, 9)
    return [Run(False, r) for r in range(restarts)] + [
        Run(True, t) for t in range(1, min(targets, num_classes - 1) + 1)
    ]


def quick_runs(norm: Norm, num_classes: int) -> list[Run]:
    """One APGD-CE: an upper bound, for the figures during training."""
    return [Run(False, 0)]


@dataclass
class Evaluation:
    """What stands, for each of N points."""

    clean: Tensor  # (N,) bool: right without an attack
    robust: dict[Threat, Tensor] = field(default_factory=dict)  # (N,) bool: right, and no attack broke it
    x_adv: dict[Threat, Tensor] = field(
        default_factory=dict
    )  # (N, ...) the image that broke the point; x where none was found
    broken_by: dict[Threat, dict[str, int]] = field(default_factory=dict)  # how many points each run broke, in turn

    @property
    def union(self) -> Tensor:
        """(N,) bool: right, and broken under no norm."""
        return torch.stack([self.clean, *self.robust.values()]).all(0)

    def outcomes(self) -> dict[str, Tensor]:
        """Per point (N,), in [0, 1]: clean, each norm, average over the norms, union."""
        rows = {"clean": self.clean} | {threat.norm: robust for threat, robust in self.robust.items()}
        average = (
            torch.stack([robust.float() for robust in self.robust.values()]).mean(0) if self.robust else self.clean
        )
        return rows if not self.robust else rows | {"average": average, "union": self.union}


def evaluate(
    model: Model,
    x: Tensor,
    y: Tensor,
    threats: Sequence[Threat],
    device: torch.device,
    n_iter: int = 100,
    quick: bool = False,
    batch_size: int = 250,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Attack the points x (N, ...) in [0, 1], y (N,) that are right: with the standard runs, or one APGD-CE each if `quick`.

    x and y stay on the CPU, batches go to `device`, where the model is, in eval mode. The random starts depend on
    (seed, point, run, norm), not on the batches. Images outside ball or box don't count and are warned of.
    """
    logits = []
    for batch in x.split(batch_size):
        with torch.no_grad():
            logits.append(model(batch.to(device)).float().cpu())
    all_logits = torch.cat(logits)
    # The k-th row of classes by falling logit is the k-th target: a right point has its label in row 0.
    ranked = all_logits.argsort(dim=1, descending=True)
    evaluation = Evaluation(clean=ranked[:, 0] == y)
    num_classes = all_logits.shape[1]
    for threat in threats:
        standing = evaluation.clean.clone()
        x_adv = x.clone()
        counts: dict[str, int] = {}
        for run in (quick_runs if quick else standard_runs)(threat.norm, num_classes):
            left = standing.nonzero()[:, 0]
            bar = tqdm(total=len(left), desc=f"{threat}, {run}", unit="point", disable=not progress, leave=False)
            for index in left.split(batch_size) if len(left) else ():
                found, images = _attack(
                    model, x[index], y[index], ranked[index], index, threat, run, n_iter, seed, device
                )
                x_adv[index[found]] = images[found]
                standing[index[found]] = False
                bar.update(len(index))
            bar.close()
            counts[str(run)] = len(left) - int(standing.sum())
        evaluation.robust[threat], evaluation.x_adv[threat], evaluation.broken_by[threat] = standing, x_adv, counts
    return evaluation


def _attack(
    model: Model,
    x: Tensor,
    y: Tensor,
    ranked: Tensor,
    index: Tensor,
    threat: Threat,
    run: Run,
    n_iter: int,
    seed: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """One run on a batch: which points it broke with an allowed image, (B,) bool, and the images (B, ...), both on the CPU."""
    start = random_starts(x, index, threat, run, seed).to(device)
    loss = cross_entropy
    if run.targeted:
        targeted = dlr_targeted if ranked.shape[1] >= 4 else margin_targeted
        loss = partial(targeted, target=ranked[:, run.number].to(device))  # type: ignore[assignment]
    attack = apgd_shrinking if threat.norm == "L1" else apgd
    result = attack(model, x.to(device), y.to(device), threat, n_iter, loss, start)
    broken, images = result.broken.cpu(), result.x_adv.cpu()
    allowed = threat.contains(x, images)
    if not bool(allowed[broken].all()):
        warnings.warn(
            f"{int((~allowed & broken).sum())} images of {run} are outside {threat} or [0, 1]: they do not count",
            stacklevel=2,
        )
    return broken & allowed, images


def random_starts(x: Tensor, index: Tensor, threat: Threat, run: Run, seed: int) -> Tensor:
    """A start (B, ...) for each of the points `index` (B,), the same whatever the batch: uniform in the cube for Linf, else Gaussian.

    Scaled to the ball's surface; the attack projects it on the box.
    """
    norm = NORMS.index(threat.norm)
    noise = torch.stack(
        [
            torch.randn(x.shape[1:], generator=generator(seed, int(i), norm, int(run.targeted), run.number))
            for i in index
        ]
    )
    if threat.norm == "Linf":
        noise = 2 * torch.special.ndtr(noise) - 1
        return threat.eps * noise
    order = 2 if threat.norm == "L2" else 1
    return threat.eps * noise / noise.flatten(1).norm(p=order, dim=1).view(-1, *[1] * (x.dim() - 1))


def summarise(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """For clean, each norm, average, union: accuracy and 95 % interval in per cent, number of points.

    Wilson's interval for shares, the normal one for the average.
    """
    from scipy.stats import binomtest

    rows: dict[str, dict[str, float]] = {}
    for name, outcome in evaluation.outcomes().items():
        values = outcome.double().numpy()
        n = len(values)
        if name == "average":
            half = 1.96 * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else 1.0
            low, high = max(values.mean() - half, 0.0), min(values.mean() + half, 1.0)
        else:
            interval = binomtest(int(values.sum()), n).proportion_ci(method="wilson")
            low, high = interval.low, interval.high
        accuracy, low, high = (round(100 * float(share), 2) for share in (values.mean(), low, high))
        rows[name] = {"accuracy": accuracy, "low": low, "high": high, "points": n}
    return rows


def save(evaluation: Evaluation, y: Tensor, folder: Path, **more: Any) -> None:
    """Write folder/eval.json (accuracies, what each run broke, and `more`) and the images, a file for each threat model."""
    for threat, x_adv in evaluation.x_adv.items():
        save_images(folder, str(threat), x_adv, y, evaluation.robust[threat])
    broken_by = {str(threat): counts for threat, counts in evaluation.broken_by.items()}
    write_json(folder / "eval.json", {"accuracy": summarise(evaluation), "broken_by": broken_by, **more})
