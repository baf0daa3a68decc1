"""Robust accuracy for each norm and their union: every run of the attack on the points that still stand, no pass more.

Each point goes through its runs until one step breaks it. The batch in work is kept full: a row that is done makes room for the next
point, or for the same point's next run. What is finished is in a journal, so an evaluation can stop and go on, in any number of processes.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from attacks.apgd import APGD, EVALUATION_SHARE, Model, Rows, apgd, judge, shrinking
from attacks.checks import network_warnings, result_warnings
from attacks.curve import above, accuracy_curve, below
from attacks.losses import cross_entropy, dlr_targeted, margin_targeted
from attacks.results import Evaluation, Run, Tally, runs_for
from attacks.threat import NORMS, Threat
from utils.distributed import from_first, wait_for_all
from utils.journal import ImageFile, Journal
from utils.speed import Amp, in_format
from utils.training import generator

UNTARGETED = -1


@dataclass(frozen=True)
class Points:
    """N images (N, C, H, W), uint8 from 0 to `levels` or floats in [0, 1] with levels 1, on the CPU, and labels (N,)."""

    images: Tensor
    y: Tensor
    levels: int = 1

    def __len__(self) -> int:
        return len(self.y)

    def x(self, index: Tensor) -> Tensor:
        """Images (B, C, H, W) as float32 in [0, 1]."""
        return self.images[index].float() / self.levels


@dataclass(frozen=True)
class Budget:
    """How much is spent on a point: the attacks by name (see `runs_for`), steps of a run, and the number of its kinds."""

    attacks: str = "standard"
    n_iter: int = 100
    n_restarts: int | None = None
    n_targets: int | None = None
    union_only: bool = False  # a point broken under one norm is not attacked under the others
    curve: bool = False  # also one APGD-CE at radii up to 2 eps
    amp: Amp = "off"  # the attack's passes in this format; every point it breaks is checked in float32 before it counts


def evaluate(
    model: Model,
    points: Points,
    threats: Sequence[Threat],
    device: torch.device,
    budget: Budget = Budget(),
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
    are warned of. The folder's journal must be of the same network, points, threats, budget and seed.
    """
    rank, number = share
    journal = Journal(folder, rank)
    mine = torch.arange(rank, len(points), number)
    ranked, found = _clean(model, points, mine, device, batch_size, journal)
    wait_for_all()
    tallies = {
        t: _empty(len(points), runs_for(budget.attacks, t.norm, ranked.shape[1], budget.n_restarts, budget.n_targets))
        for t in threats
    }
    clean = _replay(journal, len(points), tallies)
    order = list(threats)
    if budget.union_only:
        index = clean.nonzero()[:32, 0]
        order = from_first(lambda: _most_broken_first(model, points, index, threats, device))
    standing = clean & ~torch.stack([torch.zeros_like(clean), *(tally.broken for tally in tallies.values())]).any(0)
    for threat in order:
        images = None
        if folder:
            path = image_path(folder, threat)
            if rank == 0:
                ImageFile.make(path, len(points), points.x)
            wait_for_all()
            images = ImageFile(path)
        left = standing if budget.union_only else clean
        chosen = [i for i in mine.tolist() if left[i]]
        work = Work(model, points, ranked, threat, tallies[threat], budget, seed, device, journal, images)
        work.run_apgd(chosen, batch_size, progress and rank == 0)
        if budget.attacks == "autoattack":
            work.run_library(chosen, batch_size)
        standing &= ~tallies[threat].broken
    curve: dict[Threat, Tally] = {}
    for threat in threats if budget.curve else ():
        # A point that stands at eps stands below; one that broke at a radius is broken above it.
        smaller, larger = below(threat), above(threat)
        for radii, pending in ((smaller, clean & tallies[threat].broken), (larger, clean & ~tallies[threat].broken)):
            for radius in radii:
                curve[radius] = _empty(len(points), [Run("CE")])
                _replay(journal, len(points), {radius: curve[radius]})
                work = Work(model, points, ranked, radius, curve[radius], budget, seed, device, journal, None)
                work.run_apgd([i for i in mine.tolist() if pending[i]], batch_size, progress and rank == 0)
                pending = pending & ~curve[radius].broken
    wait_for_all()
    clean = _replay(journal, len(points), tallies | curve)  # with the other processes' part
    evaluation = Evaluation(clean, tallies, budget.union_only, warnings=found)
    if budget.curve:
        evaluation.curve = {threat: accuracy_curve(evaluation, threat, curve) for threat in threats}
    evaluation.warnings += result_warnings(evaluation)
    return evaluation


def image_path(folder: Path, threat: Threat) -> Path:
    """Where an evaluation keeps the images of a threat model."""
    return folder / f"adv_{str(threat).replace(' ', '_')}.npy"


def random_starts(x: Tensor, points: Sequence[int], threat: Threat, runs: Sequence[Run], seed: int) -> Tensor:
    """A start (B, ...) for each row's point and run, whatever the batch: uniform in the cube for Linf, else Gaussian.

    Scaled to the ball's surface; the attack projects it on the box.
    """
    norm = NORMS.index(threat.norm)
    noise = torch.stack(
        [
            torch.randn(x.shape[1:], generator=generator(seed, point, norm, int(run.kind == "T"), run.number))
            for point, run in zip(points, runs, strict=True)
        ]
    )
    if threat.norm == "Linf":
        noise = 2 * torch.special.ndtr(noise) - 1
        return threat.eps * noise
    order = 2 if threat.norm == "L2" else 1
    return threat.eps * noise / noise.flatten(1).norm(p=order, dim=1).view(-1, *[1] * (x.dim() - 1))


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


def _empty(n: int, runs: list[Run]) -> Tally:
    return Tally(runs, torch.zeros(n, len(runs), dtype=torch.int32), torch.full((n,), -1))


def _replay(journal: Journal, n: int, tallies: dict[Threat, Tally]) -> Tensor:
    """Fill the tallies with all that the journal knows; which points are right, (N,) bool."""
    clean = torch.zeros(n, dtype=torch.bool)
    by_name = {str(threat): tally for threat, tally in tallies.items()}
    for record in journal.records():
        point = record["point"]
        if record["task"] == "clean":
            clean[point] = record["right"]
        else:
            if record["task"] not in by_name:
                continue  # another radius of the curve
            tally = by_name[record["task"]]
            tally.passes[point, record["run"]] = record["passes"]
            if record["broken"]:
                tally.broken_by[point] = record["run"]
    return clean


def _most_broken_first(
    model: Model, points: Points, index: Tensor, threats: Sequence[Threat], device: torch.device
) -> list[Threat]:
    """By how many of some right points ten steps break."""
    if not len(index):
        return list(threats)
    x, y = points.x(index).to(device), points.y[index].to(device)

    def broken(threat: Threat) -> int:
        return int(apgd(model, x, y, threat, n_iter=10, share=EVALUATION_SHARE).broken.sum())

    return sorted(threats, key=broken, reverse=True)


class Work:
    """One threat model's attacks on some points."""

    def __init__(
        self,
        model: Model,
        points: Points,
        ranked: Tensor,
        threat: Threat,
        tally: Tally,
        budget: Budget,
        seed: int,
        device: torch.device,
        journal: Journal,
        images: ImageFile | None,
    ) -> None:
        self.model, self.points, self.ranked, self.threat, self.tally = model, points, ranked, threat, tally
        self.seed, self.device, self.journal, self.images = seed, device, journal, images
        self.apgd_runs = sum(run.kind in ("CE", "T") for run in tally.runs)
        self.amp, self.fast_model = budget.amp, in_format(model, device, budget.amp)
        stages = shrinking(threat.eps, budget.n_iter) if threat.norm == "L1" else [(threat.eps, budget.n_iter)]
        self.search = APGD(threat.norm, stages, EVALUATION_SHARE, device)

    def run_apgd(self, chosen: Sequence[int], batch_size: int, progress: bool) -> None:
        """Every APGD run on each of the points `chosen` until one breaks it."""
        tally = self.tally
        left = [i for i in chosen if not tally.broken[i] and tally.next_run(i) < self.apgd_runs]
        queue = deque(sorted((tally.next_run(i), i) for i in left))
        standing = sum(not bool(tally.broken[i]) for i in chosen)
        bar = tqdm(
            total=self.apgd_runs * len(left),
            initial=0,
            unit="run",
            desc=str(self.threat),
            disable=not progress,
            leave=False,
        )
        bar.update(sum(run for run, _ in queue))
        who: list[tuple[int, int]] = []  # (run, point) of each row
        ticks: list[int] = []
        y = target = torch.zeros(0, dtype=torch.int64, device=self.device)
        rows = self.search.begin(self.points.x(torch.zeros(0, dtype=torch.int64)).to(self.device))
        while queue or who:
            new = [queue.popleft() for _ in range(min(len(queue), batch_size - len(who)))]
            if new:
                x, new_y, new_target, start = self._start(new)
                rows, y, target = (
                    rows.join(self.search.begin(x, start)),
                    torch.cat([y, new_y]),
                    torch.cat([target, new_target]),
                )
                who, ticks = who + new, ticks + [0] * len(new)
            broken = self._step(rows, y, target, who, ticks)
            ticks = [tick + 1 for tick in ticks]
            done = [b or tick == self.search.ticks for b, tick in zip(broken, ticks, strict=True)]
            if any(done):
                self._record([(*who[j], ticks[j], broken[j]) for j in range(len(who)) if done[j]])
                for (run, point), b, d in zip(who, broken, done, strict=True):
                    if d:
                        bar.update(self.apgd_runs - run if b else 1)
                        standing -= b
                        if not b and run + 1 < self.apgd_runs:
                            queue.append((run + 1, point))
                stay = torch.tensor([not d for d in done], device=self.device)
                rows, y, target = rows.pick(stay), y[stay], target[stay]
                who = [w for w, d in zip(who, done, strict=True) if not d]
                ticks = [tick for tick, d in zip(ticks, done, strict=True) if not d]
            if who:
                self.search.move(rows)
                earliest = min(who)[0]
                bar.set_description(
                    f"{self.threat}, {tally.runs[earliest]} ({earliest + 1} of {self.apgd_runs})", refresh=False
                )
            bar.set_postfix_str(f"{standing} points stand", refresh=False)
        bar.close()

    def run_library(self, chosen: Sequence[int], batch_size: int) -> None:
        """pyautoattack's FAB-T and Square on the points that stand; their starts depend on the batch."""
        for number in range(self.apgd_runs, len(self.tally.runs)):
            left = [i for i in chosen if not self.tally.broken[i] and self.tally.next_run(i) == number]
            for start in range(0, len(left), batch_size):
                self._library(number, left[start : start + batch_size])

    def _start(self, new: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images, labels, targets and random starts of new rows."""
        runs, index = [self.tally.runs[run] for run, _ in new], torch.tensor([point for _, point in new])
        x = self.points.x(index)
        targets = [
            int(self.ranked[point, run.number]) if run.kind == "T" else UNTARGETED
            for run, (_, point) in zip(runs, new, strict=True)
        ]
        start = random_starts(x, index.tolist(), self.threat, runs, self.seed)
        parts = x, self.points.y[index], torch.tensor(targets), start
        x, y, target, start = (part.to(self.device) for part in parts)
        return x, y, target, start

    def _step(
        self, rows: Rows, y: Tensor, target: Tensor, who: Sequence[tuple[int, int]], ticks: Sequence[int]
    ) -> list[bool]:
        """Judge each row's point and tell the search; which rows an allowed image broke: it is saved."""
        x_new = rows.x + rows.delta
        # The gradient is not needed at a run's last point; rows that started together end together.
        with_grad = min(ticks) + 1 < self.search.ticks
        value, grad, wrong = judge(self.fast_model, x_new, y, partial(_mixed_loss, target=target), with_grad)
        self.search.observe(rows, value, grad)
        counts = torch.tensor([tick >= self.search.counts_from for tick in ticks])
        wrong = wrong.cpu() & counts
        if self.amp != "off" and bool(wrong.any()):
            again = wrong.nonzero()[:, 0].to(self.device)
            with torch.no_grad():
                wrong[wrong.clone()] = (self.model(x_new[again]).argmax(1) != y[again]).cpu()
        index = wrong.nonzero()[:, 0]
        if len(index):
            self._keep([who[j][1] for j in index.tolist()], x_new[index.to(self.device)].cpu(), wrong, index)
        return [bool(w) for w in wrong]

    def _keep(self, numbers: Sequence[int], x_adv: Tensor, wrong: Tensor, index: Tensor) -> None:
        """Save the images (B, ...) of the points `numbers`; those that are not allowed are taken from `wrong` at their rows `index`."""
        x = self.points.x(torch.tensor(numbers))
        allowed = self.threat.contains(x, x_adv)
        if not bool(allowed.all()):
            warnings.warn(
                f"{int((~allowed).sum())} images are outside {self.threat} or [0, 1]: they do not count", stacklevel=2
            )
            wrong[index[~allowed]] = False
        if self.images and bool(allowed.any()):
            self.images.write([i for i, a in zip(numbers, allowed.tolist(), strict=True) if a], x_adv[allowed])

    def _record(self, done: Sequence[tuple[int, int, int, bool]]) -> None:
        """Note finished runs: (run, point, passes, broken) each."""
        for run, point, passes, broken in done:
            self.tally.passes[point, run] = passes
            if broken:
                self.tally.broken_by[point] = run
        self.journal.add(
            [
                {"task": str(self.threat), "point": point, "run": run, "passes": passes, "broken": broken}
                for run, point, passes, broken in done
            ]
        )

    def _library(self, number: int, chosen: Sequence[int]) -> None:
        """One of pyautoattack's attacks on a batch of points."""
        from pyautoattack import AutoAttack

        passes = 0

        def counted(x: Tensor) -> Tensor:
            nonlocal passes
            passes += len(x)
            logits: Tensor = self.model(x)
            return logits

        index = torch.tensor(chosen)
        x, y = self.points.x(index), self.points.y[index]
        attack = AutoAttack(counted, norm=self.threat.norm, eps=self.threat.eps, seed=self.seed, device=self.device)
        attack.attacks_to_run = [self.tally.runs[number].kind.lower()]
        attack.fab.n_target_classes = min(9, self.ranked.shape[1] - 1)
        x_adv = attack.run_standard_evaluation(x.to(self.device), y.to(self.device), batch_size=len(x))[0]
        with torch.no_grad():
            wrong = (self.model(x_adv).argmax(1).cpu() != y) & (x_adv.cpu() != x).flatten(1).any(1)
        rows = wrong.nonzero()[:, 0]
        if len(rows):
            self._keep(index[rows].tolist(), x_adv.cpu()[rows], wrong, rows)
        each = max(passes // len(chosen), 1)
        self._record([(number, point, each, bool(w)) for point, w in zip(chosen, wrong, strict=True)])


def _mixed_loss(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Per row (B,): cross-entropy where target is UNTARGETED, else the targeted DLR, or the margin for fewer than four classes."""
    targeted = (dlr_targeted if logits.shape[1] >= 4 else margin_targeted)(logits, y, target.clamp(min=0))
    return torch.where(target == UNTARGETED, cross_entropy(logits, y), targeted)
