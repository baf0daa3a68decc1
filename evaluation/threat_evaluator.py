"""The attacks of one threat model on some points: the batch in work is kept full with points that still stand."""

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

from attacks.apgd import APGD, EVALUATION_SHARE, APGDState, Model, loss_and_grad, shrinking
from attacks.losses import cross_entropy, dlr_targeted, margin_targeted
from attacks.threat import NORMS, Threat
from evaluation.results import AttackLog, AttackRun
from evaluation.storage import ImageFile, Journal
from utils.modules import generator
from utils.precision import Amp, autocast_model

UNTARGETED = -1
APGD_KINDS = ("CE", "T", "brief")


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
class AttackPlan:
    """How much is spent on a point: the attacks by name (see `runs_for`), steps of a run, and the number of its kinds."""

    attacks: str = "standard"
    n_iter: int = 100
    n_restarts: int | None = None
    n_targets: int | None = None
    union_only: bool = False  # a point broken under one norm is not attacked under the others
    curve: bool = False  # also one APGD-CE at radii up to 2 eps
    amp: Amp = "off"  # the attack's passes in this format; every point it breaks is checked in float32 before it counts


def image_path(folder: Path, threat: Threat) -> Path:
    """Where an evaluation keeps the images of a threat model."""
    return folder / f"adv_{str(threat).replace(' ', '_')}.npy"


def random_starts(x: Tensor, points: Sequence[int], threat: Threat, runs: Sequence[AttackRun], seed: int) -> Tensor:
    """A start (B, ...) for each row's point and run, whatever the batch, which the attack projects on ball and box.

    Uniform in the cube for Linf, Gaussian on the ball's surface for L2. For L1 Gaussian noise of deviation 1, whose projection is sparse.
    """
    norm = NORMS.index(threat.norm)
    noise = torch.stack(
        [
            torch.randn(x.shape[1:], generator=generator(seed, point, norm, APGD_KINDS.index(run.kind), run.number))
            for point, run in zip(points, runs, strict=True)
        ]
    )
    match threat.norm:
        case "Linf":
            return threat.eps * (2 * torch.special.ndtr(noise) - 1)
        case "L2":
            return threat.eps * noise / noise.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
        case "L1":
            return noise


class ThreatEvaluator:
    """One threat model's attacks on some points."""

    def __init__(
        self,
        model: Model,
        points: Points,
        ranked: Tensor,
        threat: Threat,
        log: AttackLog,
        plan: AttackPlan,
        seed: int,
        device: torch.device,
        journal: Journal,
        images: ImageFile | None,
    ) -> None:
        self.model, self.points, self.ranked, self.threat, self.log = model, points, ranked, threat, log
        self.seed, self.device, self.journal, self.images = seed, device, journal, images
        self.apgd_runs = sum(run.kind in APGD_KINDS for run in log.runs)
        self.amp, self.fast_model = plan.amp, autocast_model(model, device, plan.amp)
        eps, n_iter = threat.eps, plan.n_iter
        stages = shrinking(eps, n_iter) if threat.norm == "L1" else [(eps, n_iter)]
        self.search = APGD(threat.norm, stages, EVALUATION_SHARE, device)
        self.brief_search = APGD(threat.norm, [(eps, max(n_iter // 5, 1))], EVALUATION_SHARE, device)

    def run_apgd(self, chosen: Sequence[int], batch_size: int, progress: bool, first_alone: bool = False) -> None:
        """Every APGD run, or the first one alone, on each of the points `chosen` until one breaks it."""
        brief = sum(run.kind == "brief" for run in self.log.runs)
        for search, last in ((self.brief_search, brief), (self.search, self.apgd_runs)):
            self._run(search, min(last, 1) if first_alone else last, chosen, batch_size, progress)

    def _run(self, search: APGD, last: int, chosen: Sequence[int], batch_size: int, progress: bool) -> None:
        """The runs up to number `last` (not included), which all are of this search."""
        log = self.log
        left = [i for i in chosen if not log.broken[i] and log.next_run(i) < last]
        if not left:
            return
        queue = deque(sorted((log.next_run(i), i) for i in left))
        standing = sum(not bool(log.broken[i]) for i in chosen)
        bar = tqdm(
            total=last * len(left),
            unit="run",
            desc=str(self.threat),
            disable=not progress,
            leave=False,
        )
        bar.update(sum(run for run, _ in queue))
        who: list[tuple[int, int]] = []  # (run, point) of each row
        ticks: list[int] = []
        y = target = torch.zeros(0, dtype=torch.int64, device=self.device)
        rows = search.begin(self.points.x(torch.zeros(0, dtype=torch.int64)).to(self.device))
        while queue or who:
            new = [queue.popleft() for _ in range(min(len(queue), batch_size - len(who)))]
            if new:
                x, new_y, new_target, start = self._start(new)
                rows, y, target = (
                    rows.join(search.begin(x, start)),
                    torch.cat([y, new_y]),
                    torch.cat([target, new_target]),
                )
                who, ticks = who + new, ticks + [0] * len(new)
            broken = self._step(search, rows, y, target, who, ticks)
            ticks = [tick + 1 for tick in ticks]
            done = [b or tick == search.ticks for b, tick in zip(broken, ticks, strict=True)]
            if any(done):
                self._record([(*who[j], ticks[j], broken[j]) for j in range(len(who)) if done[j]])
                for (run, point), b, d in zip(who, broken, done, strict=True):
                    if d:
                        bar.update(last - run if b else 1)
                        standing -= b
                        if not b and run + 1 < last:
                            queue.append((run + 1, point))
                stay = torch.tensor([not d for d in done], device=self.device)
                rows, y, target = rows.pick(stay), y[stay], target[stay]
                who = [w for w, d in zip(who, done, strict=True) if not d]
                ticks = [tick for tick, d in zip(ticks, done, strict=True) if not d]
            if who:
                search.move(rows)
                earliest = min(who)[0]
                bar.set_description(
                    f"{self.threat}, {log.runs[earliest]} ({earliest + 1} of {self.apgd_runs})", refresh=False
                )
            bar.set_postfix_str(f"{standing} points stand", refresh=False)
        bar.close()

    def run_library(self, chosen: Sequence[int], batch_size: int) -> None:
        """pyautoattack's FAB-T and Square on the points that stand; their starts depend on the batch."""
        for number in range(self.apgd_runs, len(self.log.runs)):
            left = [i for i in chosen if not self.log.broken[i] and self.log.next_run(i) == number]
            for start in range(0, len(left), batch_size):
                self._library(number, left[start : start + batch_size])

    def _start(self, new: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images, labels, targets and random starts of new rows."""
        runs, index = [self.log.runs[run] for run, _ in new], torch.tensor([point for _, point in new])
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
        self,
        search: APGD,
        rows: APGDState,
        y: Tensor,
        target: Tensor,
        who: Sequence[tuple[int, int]],
        ticks: Sequence[int],
    ) -> list[bool]:
        """Judge each row's point and tell the search; which rows an allowed image broke: it is saved."""
        x_new = rows.x + rows.delta
        # The gradient is not needed at a run's last point; rows that started together end together.
        with_grad = min(ticks) + 1 < search.ticks
        value, grad, wrong = loss_and_grad(self.fast_model, x_new, y, partial(_mixed_loss, target=target), with_grad)
        search.observe(rows, value, grad)
        counts = torch.tensor([tick >= search.counts_from for tick in ticks])
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
            self.log.passes[point, run] = passes
            if broken:
                self.log.broken_by[point] = run
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
        attack.attacks_to_run = [self.log.runs[number].kind.lower()]
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
