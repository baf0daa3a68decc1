"""The standard evaluation in memory: APGD-CE and APGD-T in each threat model, on the examples not yet broken, no pass more.

The batch is kept full: a row whose run is over, since one iterate broke its example or all steps are made, makes room for the next example
or for the same example's next run. What finishes is told to a callback, and an AttackLog of what was found before can be given to go on
from, so that an evaluation can be stored, resumed and cut into parts.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from . import losses
from .apgd import APGD, EVALUATION_TOP_FRACTION, APGDState, Model, finite, forward_backward, misclassified
from .checks import result_warnings
from .early_stop import CHECKS, SCOUT_RISE, EarlyStop, margin
from .network import Examples, Network, clean_answers, failures_of
from .norms import one_stage
from .results import APGD_KINDS, STANDARD, AttackLog, AttackPlan, AttackRun, Attempt, Evaluation
from .seeds import generator
from .threat import Threat

UNTARGETED = -1
OtherAttack = Callable[[Model, Tensor, Tensor, Threat], Tensor]  # (model, x, y, threat) -> x_adv (B, ...)


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
    answers = clean_answers(network, examples, torch.arange(len(examples)))
    x_adv = {threat: examples.x(torch.arange(len(examples))) for threat in threats}
    context = EvaluationContext(network, examples, answers.ranking, plan, _KeepImages(x_adv))
    logs = {threat: context.empty_log(threat) for threat in threats}
    make_runs(context, logs, answers.right)
    evaluation = Evaluation(answers.right, logs, plan, warnings=answers.warnings, x_adv=x_adv)
    evaluation.clean_not_finite, evaluation.num_classes = answers.not_finite, answers.ranking.shape[1]
    evaluation.warnings += result_warnings(evaluation)
    return evaluation


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


class EvaluationCallback:
    """Is told what an evaluation finds while it goes on; this one does nothing with it."""

    def broken(self, threat: Threat, examples: Sequence[int], x_adv: Tensor) -> None:
        """Allowed images (B, C, H, W), on the CPU, that broke these examples; told before `runs_finished`."""

    def runs_finished(self, threat: Threat, finished: Sequence[Attempt]) -> None:
        """Some runs are over."""

    def progress(self, threat: Threat, done: int, total: int, status: str) -> None:
        """After each step of the batch: runs done, those that a broken example does without among them, of all; what goes on."""


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
    """One threat model's runs, which fill its log. Raises ValueError for runs of attacks that the context does not have."""

    def __init__(self, context: EvaluationContext, threat: Threat, log: AttackLog) -> None:
        self.context, self.network, self.examples = context, context.network, context.examples
        self.threat, self.log = threat, log
        kinds = [run.kind for run in log.runs]
        unknown = " and ".join(sorted({*kinds} - {*APGD_KINDS, *context.other_attacks}))
        if unknown:
            raise ValueError(f"{unknown}: not part of this package; eval.py makes them, with pyautoattack")
        n_iter, like = context.plan.n_iter, torch.zeros(0, device=self.network.device, dtype=torch.float32)
        search = partial(APGD, threat.norm, top_fraction=EVALUATION_TOP_FRACTION, like=like)
        brief, full = one_stage(threat.eps, max(n_iter // 5, 1)), threat.spec.stages(threat.eps, n_iter)
        self.apgd_runs = sum(kind in APGD_KINDS for kind in kinds)
        # Which runs are of which search: those before a number, the brief one's first, then scouts.
        scouts = kinds.count("brief") + sum(run.scout for run in log.runs)
        self.searches = [(search(stages=brief), kinds.count("brief")), (search(stages=full), self.apgd_runs)]
        if scouts > kinds.count("brief"):
            self.searches.insert(1, (search(stages=threat.spec.stages(threat.eps, max(n_iter // 5, 4))), scouts))
        self.rule = context.plan.early_stop

    def run(self, chosen: Tensor, first_only: bool = False) -> None:
        """Every run, or the first one only, on each of the examples chosen (N,) bool until one breaks it."""
        for search, last in self.searches:
            self._make(search, min(last, 1) if first_only else last, chosen)
        for number in () if first_only else range(self.apgd_runs, len(self.log.runs)):
            left = (chosen & ~self.log.broken & (self.log.next_run == number)).nonzero()[:, 0]
            for start in range(0, len(left), self.network.batch_size):
                self._make_other(number, left[start : start + self.network.batch_size])

    def _make(self, search: APGD, last: int, chosen: Tensor) -> None:
        """The runs before number `last`, which all are of this search, on the examples chosen, side by side."""
        waiting = self._left(last, chosen)
        total, done = last * len(waiting), sum(each.run for each in waiting)
        device = self.network.device
        state = search.begin(self.examples.x(torch.arange(0)).to(device, non_blocking=True))  # of the rows
        rows = self._rows([])
        while waiting or len(rows):
            new = [waiting.popleft() for _ in range(min(len(waiting), self.network.batch_size - len(rows)))]
            if new:
                rows, state = rows.join(self._rows(new)), state.join(self._begin(search, new))
            over = self._judge(search, state, rows)
            if bool(over.any()):
                finished, left = rows.attempts(over), (~over).nonzero()[:, 0]
                going_on = self._finish(finished, last)
                done += sum(last - each.run for each in finished) - sum(last - each.run for each in going_on)
                waiting.extend(going_on)
                rows, state = rows.pick(left), state.pick(left.to(device, non_blocking=True))
            if len(rows):
                search.move(state)
            earliest = [int(rows.run.min())] if len(rows) else []
            running = [f"{self.log.runs[run]} ({run + 1} of {self.apgd_runs})" for run in earliest]
            unbroken = f"{int((chosen & ~self.log.broken).sum())} examples not yet broken"
            self.context.callback.progress(self.threat, done, total, ", ".join([*running, unbroken]))

    def _left(self, last: int, chosen: Tensor) -> deque[Attempt]:
        """The first of the runs before number `last` that each of the examples chosen still needs, the earlier runs first."""
        next_run = self.log.next_run
        index = (chosen & ~self.log.broken & (next_run < last)).nonzero()[:, 0]
        waiting = map(Attempt, next_run[index].tolist(), index.tolist())
        return deque(sorted(self._begun(waiting, last)))

    def _begun(self, attempts: Iterable[Attempt], last: int) -> Iterable[Attempt]:
        """The attempts, each with the next run before number `last` that the rule begins, without those that have none."""
        if self.rule is None:
            return attempts
        return [each for each in attempts if self._next(each, last)]

    def _next(self, attempt: Attempt, last: int) -> bool:
        """Set the attempt's run to the next one before number `last` that the rule begins; is there one?"""
        assert self.rule is not None
        reach = self.log.reach[attempt.example].tolist()
        while attempt.run < last and not self.rule.begins(self.log.runs, attempt.run, reach):
            attempt.run += 1
        return attempt.run < last

    def _rows(self, new: Sequence[Attempt]) -> _Rows:
        """New rows, whose run of APGD-T aims at a place in the ranking, from 1."""
        run, example = (
            torch.tensor([getattr(each, name) for each in new], dtype=torch.int64) for name in ("run", "example")
        )
        place = torch.tensor([log_run.number if log_run.kind == "T" else 0 for log_run in self.log.runs])[run]
        target = torch.where(place > 0, self.context.ranking[example, place].long(), UNTARGETED)
        passes, no = torch.zeros_like(run), torch.zeros_like(run, dtype=torch.bool)
        unknown = (torch.full((len(run),), float("-inf")) for _ in range(4))
        on_device = (value.to(self.network.device, non_blocking=True) for value in (self.examples.y[example], target))
        return _Rows(run, example, passes, no, no.clone(), no.clone(), *unknown, *on_device)

    def _begin(self, search: APGD, new: Sequence[Attempt]) -> APGDState:
        """The search's state for new rows, at their random starts."""
        examples, runs = [each.example for each in new], [self.log.runs[each.run] for each in new]
        x = self.examples.x(torch.tensor(examples)).to(self.network.device, non_blocking=True)
        return search.begin(x, random_starts(x, examples, self.threat, runs, self.context.plan.seed))

    def _judge(self, search: APGD, state: APGDState, rows: _Rows) -> Tensor:
        """Judge each row's iterate; tell the search; note what an allowed image broke and what was not finite: (B,) bool, who is done.

        The host waits for the device once, and once more where an example breaks.
        """
        x_adv = state.x + state.delta
        # The gradient is not needed at a run's last iterate; rows that started together end together.
        with_grad = int(rows.passes.min()) + 1 < search.ticks
        model = self.network.attack_model or self.network.model
        with failures_of(rows.example):
            logits, value, grad = forward_backward(
                model, x_adv, rows.y, partial(_mixed_loss, target=rows.target), with_grad
            )
        search.receive(state, *finite(value, grad))
        not_finite = ~(logits.isfinite().all(1) & grad.flatten(1).isfinite().all(1))
        found = [misclassified(logits, rows.y), not_finite]
        if self.rule:
            *bools, margins = torch.stack([*(each.float() for each in found), margin(logits, rows.y)]).cpu()
            wrong, not_finite = (each > 0 for each in bools)
            rows.note(margins, search, self.rule if search is self.searches[-1][0] else None)
        else:
            wrong, not_finite = torch.stack(found).cpu()
        rows.not_finite |= not_finite
        rows.broken = self._confirmed(x_adv, rows.y, rows.example, wrong & (rows.passes >= search.counts_from))
        rows.passes += 1
        rows.dropped &= ~rows.broken & (rows.passes < search.ticks)
        return rows.broken | rows.dropped | (rows.passes >= search.ticks)

    def _confirmed(self, x_adv: Tensor, y: Tensor, example: Tensor, wrong: Tensor) -> Tensor:
        """Of the misclassified (B,) images x_adv (B, ...) those that count, which the callback gets: (B,) bool.

        They have to be in ball and box, the others are warned of, and misclassified by `model` too if another network was attacked.
        """
        index = wrong.nonzero()[:, 0]
        if not len(index):
            return wrong
        here = index.to(x_adv.device, non_blocking=True)
        found, numbers = x_adv[here], example[index]
        verdict = torch.ones_like(here, dtype=torch.bool)
        if self.network.attack_model:
            verdict = self.network.wrong(found, y[here], numbers)
        both = torch.cat([found.flatten(1), verdict[:, None].to(found.dtype)], 1).cpu()  # one copy, one wait
        found, counts = both[:, :-1].view(-1, *x_adv.shape[1:]), both[:, -1] > 0
        allowed = self.threat.contains(self.examples.x(numbers), found)
        if not bool(allowed.all()):
            outside = f"{int((~allowed).sum())} images are outside {self.threat} or [0, 1]"
            warnings.warn(f"{outside}: they do not count", stacklevel=2)
        counts &= allowed
        if bool(counts.any()):
            self.context.callback.broken(self.threat, numbers[counts].tolist(), found[counts])
        return wrong.masked_scatter(wrong, counts)

    def _make_other(self, number: int, index: Tensor) -> None:
        """One of the other attacks on a batch of examples; its starts may depend on the batch."""
        passes = 0

        def counted(images: Tensor) -> Tensor:
            nonlocal passes
            passes += len(images)
            return self.network.model(images)

        x, y = self.examples.x(index).to(self.network.device), self.examples.y[index].to(self.network.device)
        attack = self.context.other_attacks[self.log.runs[number].kind]
        with failures_of(index):
            x_adv = attack(counted, x, y, self.threat)
        logits = self.network.logits(x_adv, index)
        wrong = misclassified(logits, y) & (x_adv != x).flatten(1).any(1)
        broken = self._confirmed(x_adv, y, index, wrong.cpu())
        told = zip(index.tolist(), broken.tolist(), (~logits.isfinite().all(1)).tolist(), strict=True)
        spent = max(passes // len(index), 1)
        self._finish([Attempt(number, i, spent, done, bad) for i, done, bad in told], number + 1)

    def _finish(self, finished: Sequence[Attempt], last: int) -> list[Attempt]:
        """Note runs that are over; their examples' next ones, of those before number `last`."""
        self.log.add(finished)
        self.context.callback.runs_finished(self.threat, finished)
        going_on = [Attempt(each.run + 1, each.example) for each in finished if not each.broken and each.run + 1 < last]
        return list(self._begun(going_on, last))


@dataclass
class _Rows:
    """The attempts in the batch, B of them: on the host, but for labels and targets, which are on the network's device."""

    run: Tensor  # (B,) int64
    example: Tensor  # (B,) int64
    passes: Tensor  # (B,) int64
    broken: Tensor  # (B,) bool
    not_finite: Tensor  # (B,) bool
    dropped: Tensor  # (B,) bool: by the rule, after this step
    reach: Tensor  # (B,) float32: as in an AttackLog
    first: Tensor  # (B,) float32: margin at the start of this stage
    best: Tensor  # (B,) float32: best margin of this stage
    half: Tensor  # (B,) float32: the same at half of the steps after which the rule is asked
    y: Tensor  # (B,) int64
    target: Tensor  # (B,) int64: the class that APGD-T aims at, else UNTARGETED

    def __len__(self) -> int:
        return len(self.run)

    def attempts(self, chosen: Tensor) -> list[Attempt]:
        """The rows chosen (B,) bool."""
        columns = (self.run, self.example, self.passes, self.broken, self.not_finite, self.dropped, self.reach)
        return [Attempt(*row) for row in zip(*(column[chosen].tolist() for column in columns), strict=True)]

    def note(self, margins: Tensor, search: APGD, rule: EarlyStop | None) -> None:
        """Margins (B,) of the rows' iterates, of which `passes` were judged before; asks the rule, if the runs may be dropped."""
        starts = torch.tensor(search.stage_starts)
        step = self.passes - starts[torch.searchsorted(starts, self.passes, right=True) - 1]
        self.first = torch.where(step == 0, margins, self.first)
        self.best = torch.where(step == 0, margins, torch.maximum(self.best, margins))
        hoped = self.best if rule else self.best + SCOUT_RISE * (self.best - self.first)
        self.reach = torch.where(self.passes >= search.counts_from, hoped, self.reach)
        self.dropped = rule.hopeless(self.best, self.half, step) if rule else torch.zeros_like(self.dropped)
        halves = torch.tensor([check // 2 for check in CHECKS])
        self.half = torch.where(torch.isin(step, halves), self.best, self.half)

    def pick(self, index: Tensor) -> _Rows:
        """The rows `index` (positions on the host)."""
        there = index.to(self.y.device, non_blocking=True)
        return _Rows(*(value[index if value.device == index.device else there] for value in vars(self).values()))

    def join(self, other: _Rows) -> _Rows:
        """These rows, then the other's."""
        return _Rows(*map(torch.cat, zip(vars(self).values(), vars(other).values(), strict=True)))


def random_starts(x: Tensor, examples: Sequence[int], threat: Threat, runs: Sequence[AttackRun], seed: int) -> Tensor:
    """A start (B, ...) for each row's example and run, whatever the batch, which the attack projects on ball and box.

    The noise is drawn on the CPU, so that it is the same for every device, and takes its shape on that of x (B, ...).
    """
    norm, pairs = threat.spec.seed_number, zip(examples, runs, strict=True)
    draws = [generator(seed, i, norm, APGD_KINDS.index(run.kind), run.number) for i, run in pairs]
    noise = torch.stack([torch.randn(x.shape[1:], generator=draw) for draw in draws])
    return threat.spec.random_start(noise.to(x.device, non_blocking=True), threat.eps)


def _mixed_loss(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Per row (B,): cross-entropy where target is UNTARGETED, else the targeted DLR, or the margin for fewer than four classes."""
    targeted_loss = losses.dlr_targeted if logits.shape[1] >= 4 else losses.margin_targeted
    targeted = targeted_loss(logits, y, target.clamp(min=0))
    return torch.where(target == UNTARGETED, losses.cross_entropy(logits, y), targeted)


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
