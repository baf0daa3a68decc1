"""Security curves: the closed form for a linear network, the radii asked for, and the rule that makes a curve fall."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eval as eval_script
from attacks.network import Examples
from attacks.results import AttackPlan
from attacks.threat import Threat
from config import EvalConfig, checked_eval, flags_given, make_parser
from evaluation import curve as curve_module
from evaluation import report
from evaluation.curve import FACTORS, curve_radii
from evaluation.evaluate import EvaluationOptions, evaluate

N, LINF, L2 = 60, Threat("Linf", 0.05), Threat("L2", 0.4)
PLAN = AttackPlan("fast", n_iter=30)


def asked(*flags: str) -> Any:
    """What --curve comes to."""
    return checked_eval(
        EvalConfig(**flags_given(make_parser(EvalConfig, None), ["--model_name=net.pth", *flags]))
    ).curve


def test_the_flag() -> None:
    assert asked() is None
    assert asked("--curve") == {"Linf": (), "L2": (), "L1": ()}
    assert asked("--curve", "--l_norms=L2") == {"L2": ()}
    assert asked("--curve=0.01 2/255", "--l_norms=Linf") == {"Linf": (0.01, 2 / 255)}
    assert asked("--curve", "L2:0.25", "--l_norms=L2") == {"L2": (0.25,)}
    assert asked("--curve=Linf:2/255,4/255 L1:6,12") == {"Linf": (2 / 255, 4 / 255), "L1": (6, 12)}


def test_the_radii() -> None:
    assert curve_radii([LINF], None) == {}
    assert [each.eps for each in curve_radii([LINF], {"Linf": ()})[LINF]] == [factor * 0.05 for factor in FACTORS]
    given = curve_radii([LINF, L2], {"L2": (0.9, 0.4, 0.1)})
    assert given == {L2: [Threat("L2", 0.1), Threat("L2", 0.9)]}  # the evaluation's own radius is attacked once


@pytest.fixture
def linear() -> nn.Module:
    """Two classes, far from the box for images between 0.4 and 0.6."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 12, generator=torch.Generator().manual_seed(0)))
        model[1].bias.copy_(-model[1].weight.sum(1) / 2)
    return model.eval().requires_grad_(False)


@pytest.fixture
def examples(linear: nn.Module) -> Examples:
    x = 0.4 + 0.2 * torch.rand(N, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    return Examples(x, linear(x).argmax(1), 1)


@pytest.mark.parametrize(
    "radii", [{"Linf": (), "L2": ()}, {"Linf": (0.002, 0.01, 0.03, 0.05, 0.08), "L2": (0.6, 0.05)}]
)
def test_a_linear_networks_curve_is_the_closed_form(
    linear: nn.Module, examples: Examples, radii: dict[str, tuple[float, ...]]
) -> None:
    options = EvaluationOptions(curve=curve_radii([LINF, L2], radii), progress=False)
    found = evaluate(linear, examples, [LINF, L2], PLAN, options).curve
    logits, weight = linear(examples.images), linear[1].weight
    margin = (logits[:, 0] - logits[:, 1]).abs()
    for threat, dual in ((LINF, 1), (L2, 2)):
        expected = {0.0, threat.eps, *(radii[threat.norm] or [factor * threat.eps for factor in FACTORS])}
        assert [eps for eps, _ in found[threat]] == sorted(expected)
        assert len({accuracy for _, accuracy in found[threat]}) >= 3
        for eps, accuracy in found[threat]:
            robust = margin > eps * (weight[0] - weight[1]).norm(p=dual)
            assert accuracy == pytest.approx(100 * float(robust.double().mean()), abs=0.01)


def test_a_curve_falls_whatever_the_attacks_find(
    linear: nn.Module, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attacks that break any examples: one broken at a radius is broken above it, and not attacked there."""
    draws, attacked = torch.Generator().manual_seed(0), dict[float, Tensor]()

    class Anything:
        def __init__(self, context: object, radius: Threat, log: Any) -> None:
            self.radius, self.log = radius, log

        def run(self, pending: Tensor) -> None:
            attacked[self.radius.eps] = pending
            self.log.broken_by[pending & (torch.rand(N, generator=draws) < 0.4)] = 0

    monkeypatch.setattr(curve_module, "ThreatEvaluator", Anything)
    radii = (0.001, 0.01, 0.02, 0.04, 0.06, 0.2, 0.3)
    options = EvaluationOptions(curve=curve_radii([LINF], {"Linf": radii}), progress=False)
    result = evaluate(linear, examples, [LINF], PLAN, options)
    broken = result.logs[LINF].broken
    accuracy = [accuracy for _, accuracy in result.curve[LINF]]
    assert accuracy == sorted(accuracy, reverse=True)
    assert len(set(accuracy)) > 5
    assert result.curve[LINF][5] == [0.05, pytest.approx(100 * float((~broken).double().mean()), abs=0.01)]
    assert sorted(attacked) == list(radii)
    for group, first in ((radii[:4], broken), (radii[4:], ~broken)):
        assert torch.equal(attacked[group[0]], first)
        for smaller, larger in pairwise(group):
            assert bool((attacked[larger] <= attacked[smaller]).all())


def test_the_picture_marks_the_evaluations_radius(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(report, "_picture", lambda _, __, *shown: figures.extend(shown) or {})
    rows = [[0.0, 90.0], [0.3, 60.0], [0.31, 50.0], [0.32, 40.0], [2.0, 0.0]]
    report._curve({"L2": rows, "L1": rows}, {"L2": 0.3, "Linf": 0.1, "L1": 2.0}, ())
    for figure, eps in zip(figures, (0.3, 2.0), strict=True):
        curve, mark = figure.axes[0].lines
        assert list(curve.get_xdata()) == [eps for eps, _ in rows]
        assert list(mark.get_xdata()) == [eps, eps]


def test_eval_draws_and_resumes_own_radii(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(
        "import torch\n\n\ndef make():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    flags = ["--model_name=nets.py:make", "--dataset=digits", "--n_ex=30", "--n_iter=4", "--attacks=fast"]
    flags += ["--l_norms=Linf L1", "--l_eps=0.1 2", "--device=cpu"]
    folder = eval_script.main([*flags, "--curve=Linf:0.05,0.3"])
    content = json.loads((folder / "eval.json").read_text())
    assert [eps for eps, _ in content["curve"]["Linf"]] == [0, 0.05, 0.1, 0.3]
    assert list(content["curve"]) == ["Linf"]
    assert content["settings"]["curve"] == {"Linf": [0.05, 0.3]}
    again = eval_script.main([*flags, "--curve=Linf:0.3,0.05", "--resume"])  # the order does not matter
    assert json.loads((again / "eval.json").read_text())["curve"] == content["curve"]
    assert again == folder
    capsys.readouterr()
    for other in ("--curve=Linf:0.05", "--curve", "--curve=L1:0.05,0.3"):
        with pytest.raises(SystemExit):
            eval_script.main([*flags, other, "--resume"])
        assert "curve differ" in capsys.readouterr().err
