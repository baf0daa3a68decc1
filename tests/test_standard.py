"""The standard evaluation: what it counts, what it saves, and agreement with another library."""

from pathlib import Path

import pytest
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from attacks import standard
from attacks.standard import Evaluation, evaluate, standard_runs, summarise
from attacks.threat import NORMS, RADII, Threat, threats_for
from data import load_dataset
from models import build_model
from utils.training import parameter_groups

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A small network trained on digits with noise for a few seconds: neither robust nor broken everywhere."""
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


@pytest.fixture(scope="module")
def points() -> tuple[Tensor, Tensor]:
    return load_dataset("digits", "").test.first(200).pixels()


# Half the radius: a network that is neither robust nor broken at all points, so that a weaker attack would show.
@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_robust_accuracy_agrees_with_pyautoattack(norm, network, points) -> None:  # type: ignore[no-untyped-def]
    x, y = points
    threat = Threat(norm, RADII["digits"][norm] / 2)
    ours = evaluate(network, x, y, [threat], CPU, progress=False).robust[threat].float().mean()
    other = AutoAttack(network, norm=norm, eps=threat.eps, version="standard", seed=0, device="cpu")
    other.attacks_to_run = ["apgd-ce", "apgd-t"]
    x_adv, _ = other.run_standard_evaluation(x, y, batch_size=200)
    theirs = (network(x_adv).argmax(1) == y).float().mean()
    assert 0.05 < theirs < 0.95
    assert abs(ours - theirs) <= 0.01


def test_the_images_are_allowed_and_break_the_network_exactly_where_it_says(network, points) -> None:  # type: ignore[no-untyped-def]
    x, y = points[0][:60], points[1][:60]
    threats = threats_for("digits", NORMS)
    result = evaluate(network, x, y, threats, CPU, n_iter=20, progress=False)
    assert torch.equal(result.clean, network(x).argmax(1) == y)
    for threat in threats:
        x_adv, robust = result.x_adv[threat], result.robust[threat]
        assert threat.contains(x, x_adv).all()
        assert torch.equal(x_adv[robust | ~result.clean], x[robust | ~result.clean])
        broken = result.clean & ~robust
        assert (network(x_adv[broken]).argmax(1) != y[broken]).all()
        assert sum(result.broken_by[threat].values()) == int(broken.sum()) > 0
    assert torch.equal(result.union, torch.stack(list(result.robust.values())).all(0))


def test_the_figures_do_not_depend_on_the_batches(network, points) -> None:  # type: ignore[no-untyped-def]
    x, y = points[0][:20], points[1][:20]
    threats = threats_for("digits", NORMS, [0.05, 0.2, 1.0])
    robust = [
        list(evaluate(network, x, y, threats, CPU, n_iter=4, batch_size=size, progress=False).robust.values())
        for size in (20, 7, 3)
    ]
    for other in robust[1:]:
        assert all(torch.equal(a, b) for a, b in zip(robust[0], other, strict=True))


def test_an_image_outside_the_ball_does_not_count(network, points, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    x, y = points[0][:10], points[1][:10]

    def far_away(model, x, y, threat, n_iter, loss, start):  # type: ignore[no-untyped-def]
        from attacks.apgd import Attacked

        return Attacked(1 - x, 1 - x, torch.ones(len(x), dtype=torch.bool), torch.zeros(len(x)))

    monkeypatch.setattr(standard, "apgd", far_away)
    threat = Threat("Linf", 0.1)
    with pytest.warns(UserWarning, match="outside Linf 0.1"):
        result = evaluate(network, x, y, [threat], CPU, progress=False)
    assert torch.equal(result.robust[threat], result.clean)


@pytest.mark.parametrize(
    ("classes", "runs"), [(10, {"Linf": 10, "L2": 10, "L1": 10}), (3, {"Linf": 3, "L2": 3, "L1": 7})]
)
def test_restarts_and_targets(classes: int, runs: dict[str, int]) -> None:
    assert {norm: len(standard_runs(norm, classes)) for norm in NORMS} == runs
    assert sum(run.targeted for run in standard_runs("L1", 10)) == 5
    assert sum(run.targeted for run in standard_runs("Linf", 10)) == 9


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).requires_grad_(False)
    x = torch.rand(20, 3, 2, 2)
    y = model(x).argmax(1)
    for threat in threats_for("cifar10", NORMS, [0.5, 2.0, 6.0]):
        assert not evaluate(model, x, y, [threat], CPU, n_iter=20, progress=False).robust[threat].any()


def test_summary_against_hand_calculation() -> None:
    linf, l1 = Threat("Linf", 0.1), Threat("L1", 1.0)
    clean = torch.tensor([True] * 8 + [False] * 2)
    robust = {linf: torch.tensor([True] * 5 + [False] * 5), l1: torch.tensor([False] * 3 + [True] * 5 + [False] * 2)}
    rows = summarise(Evaluation(clean, robust))
    assert [rows[name]["accuracy"] for name in ("clean", "Linf", "L1", "average", "union")] == [80, 50, 50, 50, 20]
    # Wilson's interval for 2 of 10: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    z, p, n = 1.959964, 0.2, 10
    centre, half = (
        (p + z * z / 2 / n) / (1 + z * z / n),
        z * (p * (1 - p) / n + z * z / 4 / n**2) ** 0.5 / (1 + z * z / n),
    )
    assert rows["union"]["low"] == pytest.approx(100 * (centre - half), abs=0.01)
    assert rows["union"]["high"] == pytest.approx(100 * (centre + half), abs=0.01)


def test_random_starts_depend_on_seed_point_run_and_norm_alone(tmp_path: Path) -> None:
    x, index = torch.rand(4, 1, 8, 8), torch.arange(4)
    for norm, order in (("Linf", float("inf")), ("L2", 2), ("L1", 1)):
        threat = Threat(norm, 0.5)
        first, second = standard_runs(norm, 10)[:2]
        starts = standard.random_starts(x, index, threat, first, 0)
        assert torch.equal(starts[2:], standard.random_starts(x[2:], index[2:], threat, first, 0))
        assert not torch.equal(starts, standard.random_starts(x, index, threat, second, 0))
        assert not torch.equal(starts, standard.random_starts(x, index, threat, first, 1))
        assert (starts.flatten(1).norm(p=order, dim=1) <= 0.5 * (1 + 1e-5)).all()
