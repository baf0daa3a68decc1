"""--attacks=quick: the runs of standard, hopeless ones dropped. More effort never breaks fewer, and what is not sound is warned of."""

from __future__ import annotations

import copy
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import eval as eval_script
from attacks import AttackPlan, Evaluation, Threat, result_warnings, robust_accuracy
from attacks.early_stop import CHECKS, EarlyStop, margin
from attacks.network import Examples
from data import load_dataset
from evaluation.curve import curve_radii
from evaluation.evaluate import EvaluationOptions, evaluate

N = 120
THREATS = [Threat("Linf", 0.1), Threat("L2", 0.4), Threat("L1", 2.0)]


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    return load_dataset("digits", "").test.take(N).pixels()


def found(network: nn.Module, images: tuple[Tensor, Tensor], **plan: object) -> Evaluation:
    return robust_accuracy(network.eval(), *images, THREATS, AttackPlan(**plan))  # type: ignore[arg-type]


class TwoLayers(nn.Module):
    """Of digits, trained for a second with Gaussian noise: a few images stand in each norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 10))
        x, y = load_dataset("digits", "").train.pixels()
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.layers(x + 0.15 * torch.randn_like(x)), y).backward()
            optimizer.step()
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return TwoLayers()


@pytest.fixture(scope="module")
def standard(network: nn.Module, images: tuple[Tensor, Tensor]) -> Evaluation:
    return found(network, images)


@pytest.fixture(scope="module")
def by_effort(network: nn.Module, images: tuple[Tensor, Tensor]) -> dict[int, Evaluation]:
    return {effort: found(network, images, attacks="quick", effort=effort) for effort in (1, 3, 6, 10)}


def test_it_finds_what_standard_finds_at_a_fraction_of_the_passes(
    standard: Evaluation, by_effort: dict[int, Evaluation]
) -> None:
    quick = by_effort[3]
    for threat, part in zip(THREATS, (6, 6, 3), strict=True):
        stands = standard.robust(threat)
        assert 0 < int(stands.sum()) < N
        assert int((quick.robust(threat) & ~stands).sum()) <= 1
        assert int(quick.logs[threat].passes.sum()) * part < int(standard.logs[threat].passes.sum())
    assert not any("dropped too early" in warning for warning in quick.warnings)


def test_at_full_effort_runs_are_those_of_standard(standard: Evaluation, by_effort: dict[int, Evaluation]) -> None:
    """To the bit in Linf and L2; in L1 scouts come before them."""
    for threat in THREATS[:2]:
        ours, theirs = by_effort[10].logs[threat], standard.logs[threat]
        assert ours.runs == theirs.runs
        assert torch.equal(ours.passes, theirs.passes)
        assert torch.equal(ours.broken_by, theirs.broken_by)
        assert "runs_dropped" not in ours.counts
    assert not (by_effort[10].robust(THREATS[2]) & ~standard.robust(THREATS[2])).any()


def test_more_effort_never_breaks_fewer(by_effort: dict[int, Evaluation]) -> None:
    efforts = sorted(by_effort)
    for less, more in pairwise(efforts):
        for threat in THREATS:
            assert not (by_effort[more].robust(threat) & ~by_effort[less].robust(threat)).any()
            passes = [int(by_effort[effort].logs[threat].passes.sum()) for effort in (less, more)]
            assert passes[0] < passes[1]


def test_dropped_runs_are_counted(by_effort: dict[int, Evaluation]) -> None:
    for threat in THREATS[:2]:
        log = by_effort[3].logs[threat]
        broke = torch.zeros_like(log.passes, dtype=torch.bool)
        rows = log.broken.nonzero()[:, 0]
        broke[rows, log.broken_by[rows]] = True
        cut = (log.passes > 0) & (log.passes < 101) & ~broke
        assert log.counts["runs_dropped"] == int(cut.sum()) > 100
        assert {int(n) for n in log.passes[cut].unique()} <= {check + 1 for check in CHECKS}


def test_the_margin_has_no_scale_and_its_sign_is_the_verdict() -> None:
    logits, y = torch.randn(200, 10, dtype=torch.float64), torch.randint(0, 10, (200,))
    for classes in (10, 4, 3, 2):
        part, label = logits[:, :classes], y % classes
        assert torch.allclose(margin(1000 * part, label), margin(part, label), atol=1e-5)
        assert torch.allclose(margin(part + 5, label), margin(part, label), atol=1e-5)
        assert torch.equal(margin(part, label) > 0, part.argmax(1) != label)
    rule, never = EarlyStop.of(3), torch.tensor([-1.0])
    for value in (float("nan"), float("inf"), -float("inf")):
        odd = margin(torch.full((1, 10), value), torch.zeros(1, dtype=torch.int64))
        assert not rule.hopeless(odd, never, torch.tensor([CHECKS[0]])).any()


@pytest.mark.parametrize("effort", range(1, 10))
def test_the_rule(effort: int) -> None:
    rule, more = EarlyStop.of(effort), EarlyStop.of(effort + 1)
    best, half = torch.rand(2, 1000) - 1
    half = torch.minimum(best, half)
    for step in range(60):
        now = torch.full((1000,), step)
        hopeless = rule.hopeless(best, half, now)
        assert hopeless.any() == (step in CHECKS)
        assert not (more.hopeless(best, half, now) & ~hopeless).any()
        assert not hopeless[best > -rule.reserve].any()
        assert not hopeless[best + 2 * (best - half) > 0].any()


class Quantised(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward((8 * x).round() / 8)


class Saturated(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return 1e5 * super().forward(x)


class Noisy(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(len(x), 10)


class NaNGradient(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0 * (x - x.detach()).abs().sqrt())


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Quantised, "gradient"), (Saturated, "gradient"), (Noisy, "random"), (NaNGradient, "infinite or NaN")],
)
def test_masked_gradients_are_warned_of(kind: type[nn.Module], words: str, images: tuple[Tensor, Tensor]) -> None:
    """Whose accuracy may be far too high, under quick as under standard."""
    quick = found(kind(), (images[0][:60], images[1][:60]), n_iter=40, attacks="quick")
    assert any(words in warning for warning in quick.warnings), quick.warnings


def test_it_is_warned_where_many_are_nearly_broken_or_broken_late(
    standard: Evaluation, by_effort: dict[int, Evaluation]
) -> None:
    quick = copy.deepcopy(by_effort[3])
    log = quick.logs[THREATS[0]]
    log.reach[quick.robust(THREATS[0]).nonzero()[:20, 0], 0] = -0.01
    rows = log.broken.nonzero()[:30, 0]
    log.passes[rows, log.broken_by[rows]] = 80
    text = "Linf 0.1: 30 images were broken late in a run and 2[0-9] that stand were nearly broken"
    assert any(re.match(text, warning) for warning in result_warnings(quick))
    assert not any("broken late" in warning for warning in result_warnings(standard))


NET = """
import sys

sys.path.insert(0, {root!r})
from tests.test_early_stop import TwoLayers


class Counts(TwoLayers):
    passes = 0

    def forward(self, x):
        Counts.passes += 1
        if Counts.passes > {limit}:
            raise MemoryError("no room")
        return super().forward(x)


make = Counts
"""


def test_an_interrupted_one_goes_on_with_what_its_runs_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--model_name=nets.py:make", "--dataset=digits", "--n_ex=60", "--attacks=quick", "--device=cpu"]
    results = {}
    for folder, limits in (("whole", [10**9]), ("cut", [150, 260, 10**9])):
        for limit in limits:
            root = str(Path(__file__).parents[1])
            Path("nets.py").write_text(NET.format(root=root, limit=limit))
            resume = ["--resume"] if folder == "cut" else []
            if limit < 10**9:
                with pytest.raises(SystemExit):
                    eval_script.main([*flags, f"--save_dir={folder}", *resume])
            else:
                result = eval_script.main([*flags, f"--save_dir={folder}", *resume])
                results[folder] = json.loads((result / "eval.json").read_text())
    one, other = results["whole"], results["cut"]
    assert one["outcomes"] == other["outcomes"]
    for norm in one["norms"]:
        assert one["norms"][norm]["forward_passes"] == other["norms"][norm]["forward_passes"]
        assert one["norms"][norm]["counts"]["runs_dropped"] >= 1


def test_the_security_curve_drops_runs_too(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    examples = Examples((255 * x).round().to(torch.uint8), y, 255)
    options = EvaluationOptions(curve=curve_radii(THREATS[:2], {"Linf": (), "L2": ()}))
    passes, curves = [], []
    for attacks in ("fast", "quick"):
        spent: list[int] = []
        counted = nn.Sequential(network)
        counted.register_forward_hook(lambda _, args, __, spent=spent: spent.append(len(args[0])))
        plan = AttackPlan(attacks, n_restarts=1, n_targets=0)
        curves.append(evaluate(counted.eval(), examples, THREATS[:2], plan, options).curve)
        passes.append(sum(spent))
    assert passes[1] * 3 < passes[0]
    for threat in THREATS[:2]:
        for (_, full), (_, less) in zip(curves[0][threat], curves[1][threat], strict=True):
            assert 0 <= less - full <= 100 * 1.01 / N
