"""The evaluation: what it counts, what it spends, what it saves, and agreement with another library."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyautoattack
import pytest
import torch
from torch import Tensor, nn

from attacks.apgd import EVALUATION_TOP_FRACTION, apgd
from attacks.losses import cross_entropy, dlr_targeted
from attacks.network import Examples, Network, clean_answers
from attacks.norms import NORMS
from attacks.results import AttackPlan, AttackRun, Attempt, Evaluation
from attacks.standard import (
    EvaluationCallback,
    EvaluationContext,
    make_runs,
    random_starts,
    robust_accuracy,
)
from attacks.threat import Threat
from data import DATASETS, load_dataset
from evaluation.evaluate import EvaluationOptions, evaluate
from evaluation.images import image_path
from models import build_model
from training.optim import parameter_groups

CPU = torch.device("cpu")
N = 60
N_ITER = 6
THREATS = [Threat(norm, eps) for norm, eps in DATASETS["digits"].radii.items()]
BATCH_SIZES = (60, 7, 3)

Model = Callable[[Tensor], Tensor]


def evaluated(
    model: Model,
    examples: Examples,
    threats: list[Threat],
    plan: AttackPlan,
    folder: Path | None = None,
    **options: Any,
) -> Evaluation:
    """Without a bar."""
    return evaluate(model, examples, threats, plan, EvaluationOptions(progress=False, **options), folder)


def digits(n: int) -> Examples:
    test = load_dataset("digits", "").test.take(n)
    return Examples(test.images, test.labels, test.levels)


@pytest.fixture(scope="module")
def examples() -> Examples:
    return digits(N)


class Counter:
    """Counts the images that pass."""

    def __init__(self, model: Model) -> None:
        self.model, self.images = model, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.model(x)


@pytest.fixture(scope="module")
def evaluations(
    network: nn.Module, examples: Examples, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[Evaluation, int, Path]]:
    """For each batch size the evaluation, the images that passed, and the folder."""
    found = {}
    for size in BATCH_SIZES:
        counter, folder = Counter(network), tmp_path_factory.mktemp("evaluation")
        evaluation = evaluated(counter, examples, THREATS, AttackPlan(n_iter=N_ITER), folder, batch_size=size)
        found[size] = evaluation, counter.images, folder
    return found


@pytest.fixture(scope="module")
def whole(evaluations: dict[int, tuple[Evaluation, int, Path]]) -> Evaluation:
    return evaluations[N][0]


def same(one: Evaluation, other: Evaluation) -> bool:
    """The same examples broken by the same runs after as many passes."""
    return torch.equal(one.clean, other.clean) and all(
        torch.equal(one.logs[threat].broken_by, log.broken_by) and torch.equal(one.logs[threat].passes, log.passes)
        for threat, log in other.logs.items()
    )


@pytest.mark.parametrize("size", BATCH_SIZES[1:])
def test_the_figures_do_not_depend_on_the_batch_size(
    size: int, evaluations: dict[int, tuple[Evaluation, int, Path]], whole: Evaluation
) -> None:
    assert same(evaluations[size][0], whole)
    for threat in THREATS:
        assert 0 < int(whole.robust(threat).sum()) < int(whole.clean.sum())


@pytest.mark.parametrize("size", BATCH_SIZES)
def test_the_passes_are_counted_to_the_pass(
    size: int, evaluations: dict[int, tuple[Evaluation, int, Path]], whole: Evaluation
) -> None:
    evaluation, images, _ = evaluations[size]
    clean, checks = N, 2 * size
    verified = sum(int(log.broken.sum()) for log in evaluation.logs.values())  # each once, from its file
    assert images == clean + checks + verified + sum(int(log.passes.sum()) for log in evaluation.logs.values())


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_each_run_is_that_of_a_lock_step_attack_cut_at_the_first_break(
    threat: Threat, network: nn.Module, examples: Examples, whole: Evaluation
) -> None:
    x, y = examples.x(torch.arange(N)), examples.y
    order = network(x).argsort(dim=1, descending=True)
    right = order[:, 0] == y
    log = whole.logs[threat]
    passes, broken_by = torch.zeros(N, len(log.runs), dtype=torch.int32), torch.full((N,), -1)
    assert len(log.runs) == (11 if threat.norm == "L1" else 10)
    for number, run in enumerate(log.runs):
        stages = threat.spec.stages(threat.eps, N_ITER)
        if run.kind == "brief":
            stages = [(threat.eps, N_ITER // 5)]
        ignored = sum(steps + 1 for _, steps in stages[:-1])
        ticks = sum(steps + 1 for _, steps in stages)
        loss = partial(dlr_targeted, target=order[:, run.number]) if run.kind == "T" else cross_entropy
        start = random_starts(x, range(N), threat, [run] * N, seed=0)
        wrong: list[Tensor] = []

        def model(images: Tensor, wrong: list[Tensor] = wrong) -> Tensor:
            logits: Tensor = network(images)
            wrong.append(logits.argmax(1) != y)
            return logits

        apgd(model, x, y, threat, N_ITER, loss, start, EVALUATION_TOP_FRACTION, stages)
        wrong_at = torch.stack(wrong)
        assert len(wrong_at) == ticks
        wrong_at[:ignored] = False
        breaks = wrong_at.any(0)
        left = right & (broken_by < 0)
        spent = torch.where(breaks, wrong_at.int().argmax(0) + 1, ticks)
        passes[:, number] = torch.where(left, spent, 0)
        broken_by[left & breaks] = number
    assert torch.equal(log.broken_by, broken_by)
    assert torch.equal(log.passes, passes)


def test_points_never_attacked_cost_nothing(whole: Evaluation) -> None:
    assert not bool(whole.clean.all())
    for log in whole.logs.values():
        assert int(log.passes[~whole.clean].sum()) == 0
        for point, run in enumerate(log.broken_by.tolist()):
            if run >= 0:
                assert bool((log.passes[point, : run + 1] > 0).all())
                assert int(log.passes[point, run + 1 :].sum()) == 0


def check_images(folder: Path, evaluation: Evaluation, model: Model, examples: Examples) -> None:
    """The folder's images are allowed, break the model where the evaluation says so, and are clean elsewhere."""
    x, y = examples.x(torch.arange(len(examples))), examples.y
    assert torch.equal(evaluation.clean, model(x).argmax(1) == y)
    for threat in evaluation.logs:
        x_adv = torch.from_numpy(np.load(image_path(folder, threat)))
        assert x_adv.dtype == torch.float32
        broken = evaluation.clean & ~evaluation.robust(threat)
        assert bool(broken.any())
        assert bool(threat.contains(x, x_adv).all())
        assert torch.equal(x_adv[~broken], x[~broken])
        assert bool((model(x_adv[broken]).argmax(1) != y[broken]).all())


@pytest.mark.parametrize("size", BATCH_SIZES)
def test_the_images_are_allowed_and_break_the_network_exactly_where_it_says(
    size: int, evaluations: dict[int, tuple[Evaluation, int, Path]], network: nn.Module, examples: Examples
) -> None:
    evaluation, _, folder = evaluations[size]
    check_images(folder, evaluation, network, examples)
    robust = torch.stack([evaluation.clean, *(evaluation.robust(threat) for threat in THREATS)])
    assert torch.equal(evaluation.union, robust.all(0))


def test_floats_are_as_good_as_whole_numbers(network: nn.Module, examples: Examples, whole: Evaluation) -> None:
    floats = Examples(examples.x(torch.arange(N)), examples.y)
    assert same(evaluated(network, floats, THREATS[:1], AttackPlan(n_iter=N_ITER)), whole_of(whole, 1))


def whole_of(evaluation: Evaluation, norms: int) -> Evaluation:
    return Evaluation(evaluation.clean, dict(list(evaluation.logs.items())[:norms]))


def test_images_outside_the_ball_do_not_count(
    network: nn.Module, examples: Examples, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    threat = Threat("Linf", 0.1)
    monkeypatch.setitem(NORMS, "Linf", replace(NORMS["Linf"], project=lambda delta, x, eps: 1 - 2 * x))
    with pytest.warns(UserWarning, match=r"images are outside Linf 0\.1 or \[0, 1\]: they do not count"):
        result = evaluated(network, examples, [threat], AttackPlan(n_iter=4), tmp_path)
    assert torch.equal(result.robust(threat), result.clean)
    assert np.array_equal(np.load(image_path(tmp_path, threat)), examples.x(torch.arange(N)).numpy())


def test_one_image_outside_does_not_spoil_the_others(
    network: nn.Module, examples: Examples, whole: Evaluation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    threat, contains = THREATS[0], Threat.contains
    ink = examples.x(torch.arange(N)).flatten(1).sum(1)
    refused = ink > ink.median()

    def strict(self: Threat, x: Tensor, x_adv: Tensor) -> Tensor:
        return contains(self, x, x_adv) & (x.flatten(1).sum(1) <= ink.median())

    monkeypatch.setattr(Threat, "contains", strict)
    with pytest.warns(UserWarning, match="outside Linf"):
        result = evaluated(network, examples, [threat], AttackPlan(n_iter=N_ITER), tmp_path, batch_size=16)
    before, after = whole.logs[threat], result.logs[threat]
    assert bool(before.broken[refused].any())
    assert not bool(after.broken[refused].any())
    assert torch.equal(after.broken_by[~refused], before.broken_by[~refused])
    assert torch.equal(after.passes[~refused], before.passes[~refused])
    assert torch.equal(
        after.passes[refused & result.clean], torch.full_like(after.passes, N_ITER + 1)[refused & result.clean]
    )
    monkeypatch.setattr(Threat, "contains", contains)
    check_images(tmp_path, result, network, examples)


WEAK, STRONG = (1e-4, 1e-4, 1e-4), (0.5, 2.0, 6.0)


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, classes, generator=generator)
    x = 0.45 + 0.1 * torch.rand(20, 3, 2, 2, generator=generator)

    def model(images: Tensor) -> Tensor:
        return images.flatten(1) @ weight

    examples = Examples(x, model(x).argmax(1))
    weak, strong = ([Threat(norm, eps) for norm, eps in zip(NORMS, radii, strict=True)] for radii in (WEAK, STRONG))
    result = evaluated(model, examples, [*weak, *strong], AttackPlan(n_iter=20))
    for threat in strong:
        assert len(result.logs[threat].runs) == classes - 1 + (6 if threat.norm == "L1" else 1)
        assert not bool(result.robust(threat).any())
    for threat in weak:
        assert bool(result.robust(threat).all())


def test_random_starts_depend_on_seed_point_run_and_norm_alone() -> None:
    x, some = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), [5, 2, 9, 7]
    first, second, target = AttackRun("CE"), AttackRun("CE", 1), AttackRun("T", 1)
    seen = []
    for norm, order in (("Linf", float("inf")), ("L2", 2), ("L1", 1)):
        threat = Threat(norm, 0.5)
        starts = random_starts(x, some, threat, [first] * 4, 0)
        assert torch.equal(starts[2:], random_starts(x[:2], some[2:], threat, [first] * 2, 0))
        mixed = random_starts(x, some, threat, [first, second, first, target], 0)
        assert (starts == mixed).flatten(1).all(1).tolist() == [True, False, True, False]
        others = [
            random_starts(x, some, threat, [run] * 4, seed) for run, seed in ((second, 0), (target, 0), (first, 1))
        ]
        projected = threat.spec.project(starts, x, torch.full((4,), 0.5)).flatten(1)
        size = projected.norm(p=order, dim=1)
        assert bool((size <= 0.5 * (1 + 1e-5)).all())
        assert bool((size >= 0.3).all())
        assert bool(((projected != 0).sum(1) < 16).all()) == (norm == "L1")  # of 64
        seen += [(starts / 0.5).flatten(), *((other / 0.5).flatten() for other in others)]
    for one, other in itertools.combinations(seen, 2):
        assert float(torch.corrcoef(torch.stack([one, other]))[0, 1].abs()) < 0.5


def test_in_memory_it_finds_what_the_stored_evaluation_finds(
    network: nn.Module, examples: Examples, evaluations: dict[int, tuple[Evaluation, int, Path]], whole: Evaluation
) -> None:
    floats = examples.x(torch.arange(N))
    result = robust_accuracy(network, floats, examples.y, THREATS, AttackPlan(n_iter=N_ITER), batch_size=7)
    assert same(result, whole)
    assert result.warnings == whole.warnings
    for threat in THREATS:
        assert torch.equal(result.x_adv[threat], torch.from_numpy(np.load(image_path(evaluations[7][2], threat))))
    rows = str(result).splitlines()[1:]
    assert [row.split()[:2] for row in rows[: len(result.accuracies())]] == [
        [name, f"{row['accuracy']:.2f}"] for name, row in whole.accuracies().items()
    ]


def test_radii_by_norm_whole_numbers_and_labels_of_other_types(network: nn.Module, examples: Examples) -> None:
    """uint8 images go from 0 to 255."""
    x, plan = (examples.x(torch.arange(8)) * 255).round().to(torch.uint8), AttackPlan("fast", n_iter=2)
    one = robust_accuracy(network, x, examples.y[:8].int(), {"L2": 0.4}, plan)
    other = robust_accuracy(network, x.double() / 255, examples.y[:8], [Threat("L2", 0.4)], plan)
    assert same(one, other)
    assert list(one.logs) == [Threat("L2", 0.4)]


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.zeros(3, 1, 8, 8), torch.zeros(2, dtype=torch.int64), "labels"),
        (torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64), "labels"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(2), "whole numbers"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), "uint8"),
        (torch.full((2, 1, 8, 8), -0.1), torch.zeros(2, dtype=torch.int64), r"\[0, 1\]"),
        (torch.full((2, 1, 8, 8), float("nan")), torch.zeros(2, dtype=torch.int64), r"\[0, 1\]"),
    ],
)
def test_what_is_no_images_and_labels_is_refused(network: nn.Module, x: Tensor, y: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        robust_accuracy(network, x, y, {"L2": 0.4})


@pytest.mark.parametrize(("attacks", "words"), [("autoattack", "eval.py"), ("slow", "unknown attacks 'slow'")])
def test_attacks_that_robust_accuracy_does_not_make(
    attacks: str, words: str, network: nn.Module, examples: Examples
) -> None:
    with pytest.raises(ValueError, match=words):
        robust_accuracy(network, examples.x(torch.arange(4)), examples.y[:4], {"L2": 0.4}, AttackPlan(attacks))


def test_two_radii_of_one_norm_have_a_row_each(network: nn.Module, examples: Examples) -> None:
    x, threats = examples.x(torch.arange(8)), [Threat("L2", 0.2), Threat("L2", 0.4)]
    rows = robust_accuracy(network, x, examples.y[:8], threats, AttackPlan("fast", n_iter=2)).accuracies()
    assert list(rows) == ["clean", "L2 0.2", "L2 0.4", "average", "union"]


class Listening(EvaluationCallback):
    """Notes what it is told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.finished: list[tuple[Threat, Attempt]] = []
        self.seen: list[tuple[Threat, int, int, str]] = []

    def broken(self, threat: Threat, examples: Sequence[int], x_adv: Tensor) -> None:
        self.told += [("broken", example) for example in examples]

    def runs_finished(self, threat: Threat, finished: Sequence[Attempt]) -> None:
        self.told += [("finished", run.example) for run in finished if run.broken]
        self.finished += [(threat, run) for run in finished]

    def progress(self, threat: Threat, done: int, total: int, status: str) -> None:
        self.seen.append((threat, done, total, status))


def test_a_callback_hears_of_all_and_what_it_heard_can_be_gone_on_from(
    network: nn.Module, examples: Examples, whole: Evaluation
) -> None:
    """Each image before its run; progress from 0 to all runs; from any part of the records the rest is found."""
    ranking = clean_answers(Network(network, CPU), examples, torch.arange(N)).ranking
    context = EvaluationContext(Network(network, CPU, 16), examples, ranking, AttackPlan(n_iter=N_ITER), Listening())
    logs = {threat: context.empty_log(threat) for threat in THREATS}
    make_runs(context, logs, whole.clean)
    heard = context.callback
    assert isinstance(heard, Listening)
    assert same(Evaluation(whole.clean, logs), whole)
    for event, example in heard.told:
        if event == "finished":
            assert ("broken", example) in heard.told[: heard.told.index((event, example))]
    for threat in THREATS:
        seen = [told for of, *told in heard.seen if of == threat]
        assert all(before[0] <= after[0] or before[1] != after[1] for before, after in itertools.pairwise(seen))
        done, total, status = seen[-1]
        assert done == total
        assert status == f"{int(whole.robust(threat).sum())} examples not yet broken"
        assert "APGD" in seen[0][2]
    for part in (0.3, 0.9):
        known = heard.finished[: int(part * len(heard.finished))]
        again = {threat: context.empty_log(threat) for threat in THREATS}
        for threat, run in known:
            again[threat].add([run])
        rest = replace(context, callback=Listening())
        make_runs(rest, again, whole.clean)
        assert same(Evaluation(whole.clean, again), whole)
        assert isinstance(rest.callback, Listening)
        assert len(rest.callback.finished) + len(known) == len(heard.finished)


@pytest.fixture(scope="module")
def union(network: nn.Module, examples: Examples) -> tuple[Evaluation, int]:
    counter = Counter(network)
    plan = AttackPlan(n_iter=N_ITER, union_only=True)
    return evaluated(counter, examples, THREATS, plan, batch_size=16), counter.images


def test_union_only_gives_the_same_union_for_fewer_passes(union: tuple[Evaluation, int], whole: Evaluation) -> None:
    evaluation, images = union
    assert torch.equal(evaluation.union, whole.union)
    assert list(evaluation.outcomes()) == ["clean", "union"]
    passes = sum(int(log.passes.sum()) for log in evaluation.logs.values())
    assert passes < sum(int(log.passes.sum()) for log in whole.logs.values())
    clean, checks = N, 2 * 16
    assert images == clean + checks + passes


def test_union_only_makes_the_first_runs_of_all_norms_before_the_rest_and_l1s_first(
    union: tuple[Evaluation, int], whole: Evaluation
) -> None:
    evaluation = union[0]
    expected = {threat: torch.zeros_like(log.passes) for threat, log in whole.logs.items()}
    left = evaluation.clean.clone()
    for runs in (slice(0, 1), slice(1, None)):
        for threat in sorted(THREATS, key=lambda threat: threat.norm != "L1"):
            full, last = whole.logs[threat], 1 if runs.stop else len(whole.logs[threat].runs)
            expected[threat][left, runs] = full.passes[left, runs]
            left &= ~(full.broken & (full.broken_by < last))
    for threat, passes in expected.items():
        assert torch.equal(evaluation.logs[threat].passes, passes)
    assert torch.equal(left, evaluation.union)


def test_union_only_needs_no_point_that_is_right(network: nn.Module, examples: Examples) -> None:
    wrong = Examples(examples.images, (network(examples.x(torch.arange(N))).argmax(1) + 1) % 10, examples.levels)
    result = evaluated(network, wrong, THREATS, AttackPlan(n_iter=N_ITER, union_only=True))
    assert not bool(result.union.any())
    assert sum(int(log.passes.sum()) for log in result.logs.values()) == 0


def test_bf16_counts_what_is_wrong_in_float32_too(trained: nn.Module, examples: Examples, tmp_path: Path) -> None:
    fast = evaluated(trained, examples, THREATS, AttackPlan(n_iter=N_ITER), tmp_path, amp="bf16")
    exact = evaluated(trained, examples, THREATS, AttackPlan(n_iter=N_ITER))
    check_images(tmp_path, fast, trained, examples)
    for threat in THREATS:
        assert abs(int(fast.robust(threat).sum()) - int(exact.robust(threat).sum())) <= 2


def test_bf16_that_errs_breaks_nothing(trained: nn.Module, examples: Examples, tmp_path: Path) -> None:
    """A network that is wrong at every image in bfloat16: each break must be seen in float32."""
    low = 0

    def model(x: Tensor) -> Tensor:
        nonlocal low
        logits: Tensor = trained(x)
        if logits.dtype == torch.bfloat16:
            low += len(x)
            return -logits
        return logits

    result = evaluated(model, examples, THREATS[:1], AttackPlan(n_iter=4), tmp_path, amp="bf16")
    log = result.logs[THREATS[0]]
    assert low == int(log.passes.sum()) > 0
    check_images(tmp_path, result, trained, examples)
    assert bool(result.robust(THREATS[0]).any())


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyautoattack with fewer steps and queries."""

    class Brief(pyautoattack.AutoAttack):  # type: ignore[misc]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            self.fab.n_iter, self.square.n_queries = 5, 150

    monkeypatch.setattr(pyautoattack, "AutoAttack", Brief)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("norm", NORMS)
def test_autoattack_goes_on_with_what_stands(norm: str, network: nn.Module, tmp_path: Path) -> None:
    """On a network of steps, where gradients are zero, Square finds what APGD cannot."""
    examples, threat = digits(12), Threat(norm, 3 * DATASETS["digits"].radii[norm])

    def stairs(x: Tensor) -> Tensor:
        logits: Tensor = network((16 * x).round() / 16)
        return logits

    standard = evaluated(stairs, examples, [threat], AttackPlan(n_iter=4, n_targets=2))
    plan = AttackPlan("autoattack", n_iter=4, n_targets=2)
    result = evaluated(stairs, examples, [threat], plan, tmp_path, batch_size=5)
    log, before = result.logs[threat], standard.logs[threat]
    assert [str(run) for run in log.runs] == [*map(str, before.runs), "FAB-T", "Square"]
    apgd_runs = len(before.runs)
    assert torch.equal(log.passes[:, :apgd_runs], before.passes)
    left = standard.robust(threat)
    for number in (apgd_runs, apgd_runs + 1):
        assert torch.equal(log.passes[:, number] > 0, left)
        left = left & (log.broken_by != number)
    assert torch.equal(result.robust(threat), left)
    assert int((log.broken_by == apgd_runs + 1).sum()) > 0
    check_images(tmp_path, result, stairs, examples)


@pytest.mark.usefixtures("brief")
def test_autoattack_with_three_classes_and_one_point() -> None:
    weight = torch.randn(108, 3, generator=torch.Generator().manual_seed(0))

    def model(images: Tensor) -> Tensor:
        return images.flatten(1) @ weight

    x = torch.full((1, 3, 6, 6), 0.5)
    examples, threat = Examples(x, model(x).argmax(1)), Threat("L2", 1e-3)
    result = evaluated(model, examples, [threat], AttackPlan("autoattack", n_iter=4))
    assert [str(run) for run in result.logs[threat].runs][-3:] == ["APGD-T target 2", "FAB-T", "Square"]
    assert bool((result.logs[threat].passes > 0).all())
    assert result.robust(threat).tolist() == [True]


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    """A ResNet trained on digits with noise for a few seconds: neither robust nor broken everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        data = load_dataset("digits", "")
        model = build_model("preact-resnet18", in_channels=1, width=4)
        optimizer = torch.optim.SGD(parameter_groups(model, 0.05, 5e-4, None), lr=0.05, momentum=0.9)
        x, y = data.train.pixels()
        for _ in range(12):
            for chosen in torch.randperm(len(x)).split(64):
                noisy = (x[chosen] + 0.3 * torch.randn_like(x[chosen])).clamp(0, 1)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(noisy), y[chosen]).backward()
                optimizer.step()
    return model.eval().requires_grad_(False)


# Half the radius: a network that is neither robust nor broken at all examples, so that a weaker attack would show.
@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_robust_accuracy_agrees_with_pyautoattack_and_bf16_with_float32(norm: str, resnet: nn.Module) -> None:
    examples, threat = digits(500), Threat(norm, DATASETS["digits"].radii[norm] / 2)
    ours, bf16 = (
        float(evaluated(resnet, examples, [threat], AttackPlan(), amp=amp).robust(threat).float().mean())
        for amp in ("off", "bf16")
    )
    other = pyautoattack.AutoAttack(resnet, norm=norm, eps=threat.eps, version="standard", seed=0, device="cpu")
    other.attacks_to_run = ["apgd-ce", "apgd-t"]
    x_adv, _ = other.run_standard_evaluation(examples.x(torch.arange(500)), examples.y, batch_size=250)
    theirs = float((resnet(x_adv).argmax(1) == examples.y).float().mean())
    print(f"{threat}: ours {ours:.3f}, in bf16 {bf16:.3f}, pyautoattack's {theirs:.3f}")
    assert 0.05 < theirs < 0.95
    assert theirs - 0.01 <= ours <= theirs + 0.005 + 1e-6
    assert abs(bf16 - ours) <= 0.005 + 1e-6


@pytest.mark.parametrize("shift", [20, -20, 1])
def test_labels_that_are_no_class_are_refused(shift: int, network: nn.Module) -> None:
    one = digits(20)
    with pytest.raises(ValueError, match="labels must be from 0 to 9"):
        robust_accuracy(network, one.x(torch.arange(20)), one.y + shift, THREATS, AttackPlan(n_iter=4))
