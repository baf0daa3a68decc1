"""The runs of one threat model on many examples: the batch is kept full, and an example goes on until one iterate breaks it.

A row whose run is over makes room for the next example, or for the same example's next run. What finishes is told to a callback, and an
AttackLog of what was found before can be given to go on from, so that an evaluation can be stored, resumed and cut into parts.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .apgd import APGD, EVALUATION_TOP_FRACTION, APGDState, Model, loss_and_grad
from .losses import cross_entropy, dlr_targeted, margin_targeted
from .norms import one_stage
from .plan import APGD_KINDS, AttackPlan, AttackRun
from .results import AttackLog, FinishedRun
from .seeds import generator
from .threat import Threat

UNTARGETED = -1
OtherAttack = Callable[[Model, Tensor, Tensor, Threat], Tensor]  # (model, x, y, threat) -> x_adv (B, ...)


@dataclass(frozen=True)
class Examples:
    """N images (N, C, H, W), uint8 from 0 to `levels` or floats in [0, 1] with levels 1, and labels (N,) int64, on the CPU."""

    images: Tensor
    y: Tensor
    levels: int = 1

    def __len__(self) -> int:
        return len(self.y)

    def x(self, index: Tensor) -> Tensor:
        """Images (B, C, H, W) as float32 in [0, 1]."""
        return self.images[index].float() / self.levels


@dataclass(frozen=True)
class Network:
    """The network whose robustness is measured, in eval mode on its device: x (B, C, H, W) in [0, 1] -> logits (B, K)."""

    model: Model
    device: torch.device
    batch_size: int = 250  # images at once
    attack_model: Model | None = None
    """Takes model's place in APGD, such as the same in bfloat16; `model` judges again what it breaks."""

    def predictions(self, x: Tensor) -> Tensor:
        """Classes (B,) on the CPU of images (B, ...) on the network's device."""
        with torch.no_grad():
            return self.model(x).argmax(1).cpu()


@dataclass(frozen=True)
class Progress:
    """How far one queue of runs is."""

    threat: Threat
    done: int  # runs, those that a broken example does without among them
    total: int
    run: str  # the earliest that is being made
    unbroken: int  # examples that no run has broken


class EvaluationCallback:
    """Is told what an evaluation finds while it goes on; this one does nothing with it."""

    def broken(self, threat: Threat, examples: Sequence[int], x_adv: Tensor) -> None:
        """Allowed images (B, C, H, W), on the CPU, that broke these examples; told before `runs_finished`."""

    def runs_finished(self, threat: Threat, finished: Sequence[FinishedRun]) -> None:
        """Some runs are over."""

    def progress(self, progress: Progress) -> None:
        """After each step of the batch."""


@dataclass(frozen=True)
class EvaluationContext:
    """What the threat models of an evaluation have in common."""

    network: Network
    examples: Examples
    ranking: Tensor  # (N, K) int16: each example's classes by falling logit at the clean image
    plan: AttackPlan
    callback: EvaluationCallback = field(default_factory=EvaluationCallback)
    other_attacks: Mapping[str, OtherAttack] = field(default_factory=dict)  # by AttackRun.kind: FAB-T, Square

    def empty_log(self, threat: Threat) -> AttackLog:
        """For the plan's runs, none of them made."""
        return AttackLog.empty(self.plan.runs(threat.norm, self.ranking.shape[1]), len(self.examples))


class ThreatEvaluator:
    """One threat model's runs, which fill its log."""

    def __init__(self, context: EvaluationContext, threat: Threat, log: AttackLog) -> None:
        self.context, self.network, self.examples = context, context.network, context.examples
        self.threat, self.log, self.callback = threat, log, context.callback
        spec, n_iter, device = threat.spec, context.plan.n_iter, context.network.device
        self.search = APGD(spec.name, spec.stages(threat.eps, n_iter), EVALUATION_TOP_FRACTION, device)
        brief = one_stage(threat.eps, max(n_iter // 5, 1))
        self.brief_search = APGD(spec.name, brief, EVALUATION_TOP_FRACTION, device)
        self.brief_runs = sum(run.kind == "brief" for run in log.runs)
        self.apgd_runs = sum(run.kind in APGD_KINDS for run in log.runs)
        unknown = {run.kind for run in log.runs} - {*APGD_KINDS, *context.other_attacks}
        if unknown:
            raise ValueError(
                f"{' and '.join(sorted(unknown))}: not part of this package; eval.py makes them, with pyautoattack"
            )

    def run(self, chosen: Tensor, first_only: bool = False) -> None:
        """Every run, or the first one only, on each of the examples chosen (N,) bool until one breaks it."""
        examples = chosen.nonzero()[:, 0].tolist()
        for search, last in ((self.brief_search, self.brief_runs), (self.search, self.apgd_runs)):
            self._make(search, _Queue(self.log, min(last, 1) if first_only else last, examples))
        if first_only:
            return
        for number in range(self.apgd_runs, len(self.log.runs)):
            left = [i for i in examples if not self.log.broken[i] and self.log.next_run(i) == number]
            for start in range(0, len(left), self.network.batch_size):
                self._make_other(number, left[start : start + self.network.batch_size])

    def _make(self, search: APGD, queue: _Queue) -> None:
        """The queue's runs, which all are of this search, side by side."""
        if not queue.waiting:
            return
        device, none = self.network.device, torch.zeros(0, dtype=torch.int64)
        empty = none.to(device)
        rows = _Rows(search.begin(self.examples.x(none).to(device)), empty, empty)
        while queue.waiting or rows.who:
            new = queue.take(self.network.batch_size - len(rows.who))
            if new:
                rows.add(*self._begin(search, new), new)
            broken = self._judge(search, rows)
            self._finish(search, rows, broken, queue)
            if rows.who:
                search.move(rows.state)
            self._tell(rows, queue)

    def _begin(self, search: APGD, new: Sequence[tuple[int, int]]) -> tuple[APGDState, Tensor, Tensor]:
        """State, labels and targeted classes of new rows, at their random starts."""
        runs, index = [self.log.runs[run] for run, _ in new], torch.tensor([example for _, example in new])
        x = self.examples.x(index)
        targets = [
            int(self.context.ranking[example, run.number]) if run.kind == "T" else UNTARGETED
            for run, (_, example) in zip(runs, new, strict=True)
        ]
        start = random_starts(x, index.tolist(), self.threat, runs, self.context.plan.seed)
        parts = x, start, self.examples.y[index], torch.tensor(targets)
        x, start, y, target = (part.to(self.network.device) for part in parts)
        return search.begin(x, start), y, target

    def _judge(self, search: APGD, rows: _Rows) -> list[bool]:
        """Put each row's iterate to the network and tell the search; for each row: an allowed image broke the example."""
        x_adv = rows.state.x + rows.state.delta
        # The gradient is not needed at a run's last iterate; rows that started together end together.
        with_grad = min(rows.ticks) + 1 < search.ticks
        model = self.network.attack_model or self.network.model
        loss = partial(_mixed_loss, target=rows.target)
        value, grad, misclassified = loss_and_grad(model, x_adv, rows.y, loss, with_grad)
        search.receive(rows.state, value, grad)
        rows.ticks = [tick + 1 for tick in rows.ticks]
        wrong = misclassified.cpu() & torch.tensor([tick > search.counts_from for tick in rows.ticks])
        if self.network.attack_model and bool(wrong.any()):
            again = wrong.nonzero()[:, 0].to(rows.y.device)
            wrong[wrong.clone()] = self.network.predictions(x_adv[again]) != rows.y[again].cpu()
        allowed: list[bool] = self._allowed([example for _, example in rows.who], x_adv, wrong).tolist()
        return allowed

    def _allowed(self, examples: Sequence[int], x_adv: Tensor, wrong: Tensor) -> Tensor:
        """Of the misclassified (B,) images x_adv (B, ...) those in ball and box, which the callback gets; the others are warned of."""
        rows = wrong.nonzero()[:, 0]
        if not len(rows):
            return wrong
        numbers, found = [examples[row] for row in rows.tolist()], x_adv[rows.to(x_adv.device)].cpu()
        allowed = self.threat.contains(self.examples.x(torch.tensor(numbers)), found)
        if not bool(allowed.all()):
            warnings.warn(
                f"{int((~allowed).sum())} images are outside {self.threat} or [0, 1]: they do not count", stacklevel=2
            )
        if bool(allowed.any()):
            told = [number for number, good in zip(numbers, allowed.tolist(), strict=True) if good]
            self.callback.broken(self.threat, told, found[allowed])
        return wrong.index_put((rows,), allowed)

    def _finish(self, search: APGD, rows: _Rows, broken: Sequence[bool], queue: _Queue) -> None:
        """Take out the rows whose runs are over, and queue their examples' next ones."""
        over = [hit or tick == search.ticks for hit, tick in zip(broken, rows.ticks, strict=True)]
        if not any(over):
            return
        each_row = zip(rows.who, rows.ticks, broken, over, strict=True)
        finished = [FinishedRun(example, run, tick, hit) for (run, example), tick, hit, ends in each_row if ends]
        self._note(finished)
        for each in finished:
            queue.finished(each)
        rows.keep([not ends for ends in over])

    def _make_other(self, number: int, chosen: Sequence[int]) -> None:
        """One of the other attacks on a batch of examples; its starts may depend on the batch."""
        passes = 0

        def counted(images: Tensor) -> Tensor:
            nonlocal passes
            passes += len(images)
            return self.network.model(images)

        index = torch.tensor(chosen)
        x, y = self.examples.x(index), self.examples.y[index]
        attack = self.context.other_attacks[self.log.runs[number].kind]
        x_adv = attack(counted, x.to(self.network.device), y.to(self.network.device), self.threat)
        wrong = (self.network.predictions(x_adv) != y) & (x_adv.cpu() != x).flatten(1).any(1)
        broken = self._allowed(chosen, x_adv, wrong).tolist()
        each = max(passes // len(chosen), 1)
        self._note([FinishedRun(example, number, each, hit) for example, hit in zip(chosen, broken, strict=True)])

    def _note(self, finished: Sequence[FinishedRun]) -> None:
        self.log.add(finished)
        self.callback.runs_finished(self.threat, finished)

    def _tell(self, rows: _Rows, queue: _Queue) -> None:
        run = ""
        if rows.who:
            earliest = min(rows.who)[0]
            run = f"{self.log.runs[earliest]} ({earliest + 1} of {self.apgd_runs})"
        self.callback.progress(Progress(self.threat, queue.done, queue.total, run, queue.unbroken))


@dataclass
class _Rows:
    """The runs that are being made, one a row of the batch."""

    state: APGDState
    y: Tensor  # (B,)
    target: Tensor  # (B,) the targeted class, or UNTARGETED
    who: list[tuple[int, int]] = field(default_factory=list)  # (run, example) of each row
    ticks: list[int] = field(default_factory=list)  # iterates judged, as state.tick, which is on the device

    def add(self, state: APGDState, y: Tensor, target: Tensor, who: Sequence[tuple[int, int]]) -> None:
        self.state, self.y = self.state.join(state), torch.cat([self.y, y])
        self.target = torch.cat([self.target, target])
        self.who, self.ticks = [*self.who, *who], self.ticks + [0] * len(who)

    def keep(self, mask: Sequence[bool]) -> None:
        chosen = torch.tensor(mask, device=self.y.device)
        self.state, self.y, self.target = self.state.pick(chosen), self.y[chosen], self.target[chosen]
        self.who = [who for who, kept in zip(self.who, mask, strict=True) if kept]
        self.ticks = [tick for tick, kept in zip(self.ticks, mask, strict=True) if kept]


class _Queue:
    """Runs to be made, the earlier numbers first, and how many are left."""

    def __init__(self, log: AttackLog, last: int, chosen: Sequence[int]) -> None:
        self.last = last
        self.waiting = deque(
            sorted((log.next_run(i), i) for i in chosen if not log.broken[i] and log.next_run(i) < last)
        )
        self.total = last * len(self.waiting)
        self.done = sum(run for run, _ in self.waiting)
        self.unbroken = sum(not bool(log.broken[i]) for i in chosen)

    def take(self, number: int) -> list[tuple[int, int]]:
        return [self.waiting.popleft() for _ in range(min(len(self.waiting), number))]

    def finished(self, each: FinishedRun) -> None:
        self.done += self.last - each.run if each.broken else 1
        self.unbroken -= each.broken
        if not each.broken and each.run + 1 < self.last:
            self.waiting.append((each.run + 1, each.example))


def random_starts(x: Tensor, examples: Sequence[int], threat: Threat, runs: Sequence[AttackRun], seed: int) -> Tensor:
    """A start (B, ...) for each row's example and run, whatever the batch, which the attack projects on ball and box."""
    norm = threat.spec.seed_number
    noise = torch.stack(
        [
            torch.randn(x.shape[1:], generator=generator(seed, example, norm, APGD_KINDS.index(run.kind), run.number))
            for example, run in zip(examples, runs, strict=True)
        ]
    )
    return threat.spec.random_start(noise, threat.eps)


def _mixed_loss(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Per row (B,): cross-entropy where target is UNTARGETED, else the targeted DLR, or the margin for fewer than four classes."""
    targeted = (dlr_targeted if logits.shape[1] >= 4 else margin_targeted)(logits, y, target.clamp(min=0))
    return torch.where(target == UNTARGETED, cross_entropy(logits, y), targeted)
