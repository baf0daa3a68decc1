"""The standard evaluation in memory: APGD-CE and APGD-T in each threat model, on the examples not yet broken, no pass more.

The batch is kept full: a row whose run is over, since one iterate broke its example or all steps are made, makes room for the next example
or for the same example's next run. What finishes is told to a callback, and an AttackLog of what was found before can be given to go on
from, so that an evaluation can be stored, resumed and cut into parts.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import compress

import torch
from torch import Tensor, nn

from . import losses
from .apgd import APGD, EVALUATION_TOP_FRACTION, APGDState, Model, loss_and_grad
from .checks import network_warnings, result_warnings
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
    """Each example's classes by falling logit at the clean image, (N, K) int16, the rows `index` filled; what is wrong with the network.

    Raises ValueError for labels that are none of its classes.
    """
    ranking = torch.zeros(len(examples), 0, dtype=torch.int16)
    found: list[str] = []
    for number, part in enumerate(index.split(network.batch_size)):
        x = examples.x(part).to(network.device)
        with torch.no_grad():
            logits = network.model(x).float().cpu()
        if number == 0:
            if int(examples.y.min()) < 0 or int(examples.y.max()) >= logits.shape[1]:
                raise ValueError(f"labels must be from 0 to {logits.shape[1] - 1}, one of the network's classes")
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
        # Which runs are of which search: those before a number, the brief one's first.
        self.searches = (search(stages=brief), kinds.count("brief")), (search(stages=full), self.apgd_runs)

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
        rows: list[Attempt] = []
        state = search.begin(self.examples.x(torch.arange(0)).to(self.network.device))  # of the rows
        while waiting or rows:
            new = [waiting.popleft() for _ in range(min(len(waiting), self.network.batch_size - len(rows)))]
            if new:
                rows, state = rows + new, state.join(self._begin(search, new))
            going = self._judge(search, state, rows)
            finished, rows = list(compress(rows, ~going)), list(compress(rows, going))
            if finished:
                done += sum(last - each.run if each.broken else 1 for each in finished)
                waiting.extend(self._finish(finished, last))
                state = state.pick(going.to(self.network.device))
            if rows:
                search.move(state)
            running = [f"{self.log.runs[row.run]} ({row.run + 1} of {self.apgd_runs})" for row in sorted(rows)[:1]]
            unbroken = f"{int((chosen & ~self.log.broken).sum())} examples not yet broken"
            self.context.callback.progress(self.threat, done, total, ", ".join([*running, unbroken]))

    def _left(self, last: int, chosen: Tensor) -> deque[Attempt]:
        """The first of the runs before number `last` that each of the examples chosen still needs, the earlier runs first."""
        next_run = self.log.next_run
        index = (chosen & ~self.log.broken & (next_run < last)).nonzero()[:, 0]
        return deque(sorted(map(Attempt, next_run[index].tolist(), index.tolist())))

    def _begin(self, search: APGD, new: Sequence[Attempt]) -> APGDState:
        """New rows at their random starts."""
        examples, runs = [each.example for each in new], [self.log.runs[each.run] for each in new]
        x = self.examples.x(torch.tensor(examples))
        start = random_starts(x, examples, self.threat, runs, self.context.plan.seed)
        return search.begin(x.to(self.network.device), start.to(self.network.device))

    def _judge(self, search: APGD, state: APGDState, rows: Sequence[Attempt]) -> Tensor:
        """Judge each row's iterate; tell the search, and note on the rows what an allowed image broke: (B,) bool, who goes on."""
        device, index = self.network.device, torch.tensor([row.example for row in rows])
        x_adv, y, target = state.x + state.delta, self.examples.y[index].to(device), self._targets(rows, index)
        # The gradient is not needed at a run's last iterate; rows that started together end together.
        with_grad = min(row.passes for row in rows) + 1 < search.ticks
        model = self.network.attack_model or self.network.model
        value, grad, misclassified = loss_and_grad(
            model, x_adv, y, partial(_mixed_loss, target=target.to(device)), with_grad
        )
        search.receive(state, value, grad)
        wrong = misclassified.cpu() & torch.tensor([row.passes >= search.counts_from for row in rows])
        if self.network.attack_model and bool(wrong.any()):
            wrong[wrong.clone()] = self.network.predictions(x_adv[wrong.to(device)]) != self.examples.y[index[wrong]]
        for row, broken in zip(rows, self._allowed(index, x_adv, wrong).tolist(), strict=True):
            row.passes, row.broken = row.passes + 1, broken
        return torch.tensor([not row.broken and row.passes < search.ticks for row in rows])

    def _targets(self, rows: Sequence[Attempt], index: Tensor) -> Tensor:
        """The class (B,) that each row's run of APGD-T aims at, which is a place in the ranking, from 1; else UNTARGETED."""
        runs = [self.log.runs[row.run] for row in rows]
        place = torch.tensor([run.number if run.kind == "T" else 0 for run in runs])
        return torch.where(place > 0, self.context.ranking[index, place].long(), UNTARGETED)

    def _allowed(self, index: Tensor, x_adv: Tensor, wrong: Tensor) -> Tensor:
        """Of the misclassified (B,) images x_adv (B, ...) those in ball and box, which the callback gets; the others are warned of."""
        if not bool(wrong.any()):
            return wrong
        numbers, found = index[wrong], x_adv[wrong.to(x_adv.device)].cpu()
        allowed = self.threat.contains(self.examples.x(numbers), found)
        if not bool(allowed.all()):
            outside = f"{int((~allowed).sum())} images are outside {self.threat} or [0, 1]"
            warnings.warn(f"{outside}: they do not count", stacklevel=2)
        if bool(allowed.any()):
            self.context.callback.broken(self.threat, numbers[allowed].tolist(), found[allowed])
        return wrong.masked_scatter(wrong, allowed)

    def _make_other(self, number: int, index: Tensor) -> None:
        """One of the other attacks on a batch of examples; its starts may depend on the batch."""
        passes = 0

        def counted(images: Tensor) -> Tensor:
            nonlocal passes
            passes += len(images)
            return self.network.model(images)

        x, y = self.examples.x(index), self.examples.y[index]
        attack = self.context.other_attacks[self.log.runs[number].kind]
        x_adv = attack(counted, x.to(self.network.device), y.to(self.network.device), self.threat)
        wrong = (self.network.predictions(x_adv) != y) & (x_adv.cpu() != x).flatten(1).any(1)
        pairs = zip(index.tolist(), self._allowed(index, x_adv, wrong).tolist(), strict=True)
        self._finish([Attempt(number, i, max(passes // len(index), 1), broken) for i, broken in pairs], number + 1)

    def _finish(self, finished: Sequence[Attempt], last: int) -> list[Attempt]:
        """Note runs that are over; their examples' next ones, of those before number `last`."""
        self.log.add(finished)
        self.context.callback.runs_finished(self.threat, finished)
        going_on = [each for each in finished if not each.broken and each.run + 1 < last]
        return [Attempt(each.run + 1, each.example) for each in going_on]


def random_starts(x: Tensor, examples: Sequence[int], threat: Threat, runs: Sequence[AttackRun], seed: int) -> Tensor:
    """A start (B, ...) for each row's example and run, whatever the batch, which the attack projects on ball and box."""
    norm, pairs = threat.spec.seed_number, zip(examples, runs, strict=True)
    draws = [generator(seed, i, norm, APGD_KINDS.index(run.kind), run.number) for i, run in pairs]
    noise = torch.stack([torch.randn(x.shape[1:], generator=draw) for draw in draws])
    return threat.spec.random_start(noise, threat.eps)


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
