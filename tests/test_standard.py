"""The evaluation: what it counts, what it spends, what it saves, and agreement with another library."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyautoattack
import pytest
import torch
from torch import Tensor, nn

from attacks import apgd as apgd_module
from attacks.apgd import EVALUATION_SHARE, apgd, shrinking
from attacks.losses import cross_entropy, dlr_targeted
from attacks.projections import project
from attacks.threat import NORMS, RADII, Threat, threats_for
from data import load_dataset
from evaluation.evaluate import evaluate
from evaluation.results import AttackRun, Evaluation
from evaluation.threat_evaluator import AttackPlan, Points, image_path, random_starts
from models import build_model
from training.optim import parameter_groups

CPU = torch.device("cpu")
N = 60
N_ITER = 6
THREATS = threats_for("digits", NORMS)
BATCH_SIZES = (60, 7, 3)

Model = Callable[[Tensor], Tensor]


def digits(n: int) -> Points:
    test = load_dataset("digits", "").test.take(n)
    return Points(test.images, test.labels, test.levels)


@pytest.fixture(scope="module")
def points() -> Points:
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
    network: nn.Module, points: Points, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[Evaluation, int, Path]]:
    """For each batch size the evaluation, the images that passed, and the folder."""
    found = {}
    for size in BATCH_SIZES:
        counter, folder = Counter(network), tmp_path_factory.mktemp("evaluation")
        evaluation = evaluate(
            counter, points, THREATS, CPU, AttackPlan(n_iter=N_ITER), size, folder=folder, progress=False
        )
        found[size] = evaluation, counter.images, folder
    return found


@pytest.fixture(scope="module")
def whole(evaluations: dict[int, tuple[Evaluation, int, Path]]) -> Evaluation:
    return evaluations[N][0]


def same(one: Evaluation, other: Evaluation) -> bool:
    """The same points broken by the same runs after as many passes."""
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
    assert images == clean + checks + sum(int(log.passes.sum()) for log in evaluation.logs.values())


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_each_run_is_that_of_a_lock_step_attack_cut_at_the_first_break(
    threat: Threat, network: nn.Module, points: Points, whole: Evaluation
) -> None:
    x, y = points.x(torch.arange(N)), points.y
    order = network(x).argsort(dim=1, descending=True)
    right = order[:, 0] == y
    log = whole.logs[threat]
    passes, broken_by = torch.zeros(N, len(log.runs), dtype=torch.int32), torch.full((N,), -1)
    assert len(log.runs) == (11 if threat.norm == "L1" else 10)
    for number, run in enumerate(log.runs):
        stages = shrinking(threat.eps, N_ITER) if threat.norm == "L1" else [(threat.eps, N_ITER)]
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

        apgd(model, x, y, threat, N_ITER, loss, start, EVALUATION_SHARE, stages)
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


def check_images(folder: Path, evaluation: Evaluation, model: Model, points: Points) -> None:
    """The folder's images are allowed, break the model where the evaluation says so, and are clean elsewhere."""
    x, y = points.x(torch.arange(len(points))), points.y
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
    size: int, evaluations: dict[int, tuple[Evaluation, int, Path]], network: nn.Module, points: Points
) -> None:
    evaluation, _, folder = evaluations[size]
    check_images(folder, evaluation, network, points)
    robust = torch.stack([evaluation.clean, *(evaluation.robust(threat) for threat in THREATS)])
    assert torch.equal(evaluation.union, robust.all(0))


def test_floats_are_as_good_as_whole_numbers(network: nn.Module, points: Points, whole: Evaluation) -> None:
    floats = Points(points.x(torch.arange(N)), points.y)
    assert same(
        evaluate(network, floats, THREATS[:1], CPU, AttackPlan(n_iter=N_ITER), progress=False), whole_of(whole, 1)
    )


def whole_of(evaluation: Evaluation, norms: int) -> Evaluation:
    return Evaluation(evaluation.clean, dict(list(evaluation.logs.items())[:norms]))


def test_images_outside_the_ball_do_not_count(
    network: nn.Module, points: Points, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    threat = Threat("Linf", 0.1)
    monkeypatch.setattr(apgd_module, "project", lambda delta, x, norm, eps: 1 - 2 * x)
    with pytest.warns(UserWarning, match=r"images are outside Linf 0\.1 or \[0, 1\]: they do not count"):
        result = evaluate(network, points, [threat], CPU, AttackPlan(n_iter=4), folder=tmp_path, progress=False)
    assert torch.equal(result.robust(threat), result.clean)
    assert np.array_equal(np.load(image_path(tmp_path, threat)), points.x(torch.arange(N)).numpy())


def test_one_image_outside_does_not_spoil_the_others(
    network: nn.Module, points: Points, whole: Evaluation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    threat, contains = THREATS[0], Threat.contains
    ink = points.x(torch.arange(N)).flatten(1).sum(1)
    refused = ink > ink.median()

    def strict(self: Threat, x: Tensor, x_adv: Tensor) -> Tensor:
        return contains(self, x, x_adv) & (x.flatten(1).sum(1) <= ink.median())

    monkeypatch.setattr(Threat, "contains", strict)
    with pytest.warns(UserWarning, match="outside Linf"):
        result = evaluate(
            network, points, [threat], CPU, AttackPlan(n_iter=N_ITER), 16, folder=tmp_path, progress=False
        )
    before, after = whole.logs[threat], result.logs[threat]
    assert bool(before.broken[refused].any())
    assert not bool(after.broken[refused].any())
    assert torch.equal(after.broken_by[~refused], before.broken_by[~refused])
    assert torch.equal(after.passes[~refused], before.passes[~refused])
    assert torch.equal(
        after.passes[refused & result.clean], torch.full_like(after.passes, N_ITER + 1)[refused & result.clean]
    )
    monkeypatch.setattr(Threat, "contains", contains)
    check_images(tmp_path, result, network, points)


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, classes, generator=generator)
    x = 0.45 + 0.1 * torch.rand(20, 3, 2, 2, generator=generator)

    def model(images: Tensor) -> Tensor:
        return images.flatten(1) @ weight

    points = Points(x, model(x).argmax(1))
    weak, strong = threats_for("cifar10", NORMS, [1e-4, 1e-4, 1e-4]), threats_for("cifar10", NORMS, [0.5, 2.0, 6.0])
    result = evaluate(model, points, [*weak, *strong], CPU, AttackPlan(n_iter=20), progress=False)
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
        threat = Threat(norm, 0.5)  # type: ignore[arg-type]
        starts = random_starts(x, some, threat, [first] * 4, 0)
        assert torch.equal(starts[2:], random_starts(x[:2], some[2:], threat, [first] * 2, 0))
        mixed = random_starts(x, some, threat, [first, second, first, target], 0)
        assert (starts == mixed).flatten(1).all(1).tolist() == [True, False, True, False]
        others = [
            random_starts(x, some, threat, [run] * 4, seed) for run, seed in ((second, 0), (target, 0), (first, 1))
        ]
        projected = project(starts, x, threat.norm, torch.full((4,), 0.5)).flatten(1)
        size = projected.norm(p=order, dim=1)
        assert bool((size <= 0.5 * (1 + 1e-5)).all())
        assert bool((size >= 0.3).all())
        assert bool(((projected != 0).sum(1) < 16).all()) == (norm == "L1")  # of 64
        seen += [(starts / 0.5).flatten(), *((other / 0.5).flatten() for other in others)]
    for one, other in itertools.combinations(seen, 2):
        assert float(torch.corrcoef(torch.stack([one, other]))[0, 1].abs()) < 0.5


@pytest.fixture(scope="module")
def union(network: nn.Module, points: Points) -> tuple[Evaluation, int]:
    counter = Counter(network)
    plan = AttackPlan(n_iter=N_ITER, union_only=True)
    return evaluate(counter, points, THREATS, CPU, plan, 16, progress=False), counter.images


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


def test_union_only_needs_no_point_that_is_right(network: nn.Module, points: Points) -> None:
    wrong = Points(points.images, (network(points.x(torch.arange(N))).argmax(1) + 1) % 10, points.levels)
    result = evaluate(network, wrong, THREATS, CPU, AttackPlan(n_iter=N_ITER, union_only=True), progress=False)
    assert not bool(result.union.any())
    assert sum(int(log.passes.sum()) for log in result.logs.values()) == 0


def test_bf16_counts_what_is_wrong_in_float32_too(trained: nn.Module, points: Points, tmp_path: Path) -> None:
    plan = AttackPlan(n_iter=N_ITER, amp="bf16")
    fast = evaluate(trained, points, THREATS, CPU, plan, folder=tmp_path, progress=False)
    exact = evaluate(trained, points, THREATS, CPU, AttackPlan(n_iter=N_ITER), progress=False)
    check_images(tmp_path, fast, trained, points)
    for threat in THREATS:
        assert abs(int(fast.robust(threat).sum()) - int(exact.robust(threat).sum())) <= 2


def test_bf16_that_errs_breaks_nothing(trained: nn.Module, points: Points, tmp_path: Path) -> None:
    """A network that is wrong at every image in bfloat16: each break must be seen in float32."""
    low = 0

    def model(x: Tensor) -> Tensor:
        nonlocal low
        logits: Tensor = trained(x)
        if logits.dtype == torch.bfloat16:
            low += len(x)
            return -logits
        return logits

    result = evaluate(
        model, points, THREATS[:1], CPU, AttackPlan(n_iter=4, amp="bf16"), folder=tmp_path, progress=False
    )
    log = result.logs[THREATS[0]]
    assert low == int(log.passes.sum()) > 0
    check_images(tmp_path, result, trained, points)
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
    points, threat = digits(12), Threat(norm, 3 * RADII["digits"][norm])  # type: ignore[arg-type, index]

    def stairs(x: Tensor) -> Tensor:
        logits: Tensor = network((16 * x).round() / 16)
        return logits

    standard = evaluate(stairs, points, [threat], CPU, AttackPlan(n_iter=4, n_targets=2), progress=False)
    plan = AttackPlan("autoattack", n_iter=4, n_targets=2)
    result = evaluate(stairs, points, [threat], CPU, plan, 5, folder=tmp_path, progress=False)
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
    check_images(tmp_path, result, stairs, points)


@pytest.mark.usefixtures("brief")
def test_autoattack_with_three_classes_and_one_point() -> None:
    weight = torch.randn(108, 3, generator=torch.Generator().manual_seed(0))

    def model(images: Tensor) -> Tensor:
        return images.flatten(1) @ weight

    x = torch.full((1, 3, 6, 6), 0.5)
    points, threat = Points(x, model(x).argmax(1)), Threat("L2", 1e-3)
    result = evaluate(model, points, [threat], CPU, AttackPlan("autoattack", n_iter=4), progress=False)
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


# Half the radius: a network that is neither robust nor broken at all points, so that a weaker attack would show.
@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_robust_accuracy_agrees_with_pyautoattack_and_bf16_with_float32(norm: str, resnet: nn.Module) -> None:
    points, threat = digits(500), Threat(norm, RADII["digits"][norm] / 2)  # type: ignore[arg-type, index]
    ours = float(evaluate(resnet, points, [threat], CPU, progress=False).robust(threat).float().mean())
    bf16 = float(
        evaluate(resnet, points, [threat], CPU, AttackPlan(amp="bf16"), progress=False).robust(threat).float().mean()
    )
    other = pyautoattack.AutoAttack(resnet, norm=norm, eps=threat.eps, version="standard", seed=0, device="cpu")
    other.attacks_to_run = ["apgd-ce", "apgd-t"]
    x_adv, _ = other.run_standard_evaluation(points.x(torch.arange(500)), points.y, batch_size=250)
    theirs = float((resnet(x_adv).argmax(1) == points.y).float().mean())
    print(f"{threat}: ours {ours:.3f}, in bf16 {bf16:.3f}, pyautoattack's {theirs:.3f}")
    assert 0.05 < theirs < 0.95
    assert theirs - 0.01 <= ours <= theirs + 0.005 + 1e-6
    assert abs(bf16 - ours) <= 0.005 + 1e-6
