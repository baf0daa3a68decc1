"""Accuracy against the radius: exact for a linear network, monotone, at radii of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import eval as eval_script
import train
from attacks.network import Examples
from attacks.results import AttackPlan
from attacks.threat import Threat
from config import EvalConfig, curve_of
from evaluation.evaluate import EvaluationOptions, evaluate

N, PIXELS = 60, 16


class Linear(nn.Module):
    """Two classes, logits (w x, 0)."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        logit = (x - 0.5).flatten(1) @ self.w
        return torch.stack([logit, torch.zeros_like(logit)], 1)


@pytest.mark.parametrize("order", [1, -1])
def test_it_is_the_closed_form_of_a_linear_network(order: int) -> None:
    """An example breaks at its margin over the dual norm of w; pixels are near 0.5, far from the box."""
    draws = torch.Generator().manual_seed(0)
    w = torch.randn(PIXELS, generator=draws)
    levels = torch.randint(100, 156, (N, 1, 4, 4), dtype=torch.uint8, generator=draws)
    x = levels.double() / 255
    margin = ((x - 0.5).flatten(1) @ w.double()).abs()
    labels = ((x - 0.5).flatten(1) @ w.double() < 0).long()
    radii = {"Linf": (0.01, 0.03, 0.05, 0.09), "L2": (0.02, 0.1, 0.3)}
    dual = {"Linf": w.double().abs().sum(), "L2": w.double().norm()}
    curve = tuple(Threat(norm, eps) for norm, several in radii.items() for eps in several[::order])
    evaluated = [Threat("Linf", 0.04), Threat("L2", 0.2)]
    plan = AttackPlan("fast", n_iter=50)
    result = evaluate(Linear(w).eval(), Examples(levels, labels, 255), evaluated, plan, EvaluationOptions(curve=curve))
    for threat in evaluated:
        expected = sorted({0.0, threat.eps, *radii[threat.norm]})
        rows = result.curve[threat]
        assert [eps for eps, _ in rows] == expected
        for eps, accuracy in rows:
            assert accuracy == pytest.approx(100 * float((margin > eps * dual[threat.norm]).double().mean()), abs=0.01)


def test_which_radii() -> None:
    threats = [Threat("Linf", 8 / 255), Threat("L1", 12.0)]

    def radii(**flags: object) -> list[str]:
        return [str(threat) for threat in curve_of(EvalConfig(**flags), threats)]  # type: ignore[arg-type]

    assert radii() == []
    assert radii(curve=())[7:] == [f"L1 {eps}" for eps in (3, 6, 9, 15, 18, 21, 24)]
    assert radii(curve=(("L1", (20.0, 12.0, 6.0)),)) == ["L1 20", "L1 6"]  # its own is there anyway


def test_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = train.main(["--dataset=digits", "--width=4", "--epochs=2", "--device=cpu"])
    flags = [f"--model_name={run}/ep_2.pth", "--n_ex=40", "--attacks=fast", "--n_iter=8", "--device=cpu"]

    def curve(*more: str) -> dict[str, list[list[float]]]:
        folder = eval_script.main([*flags, *more])
        found: dict[str, list[list[float]]] = json.loads((folder / "eval.json").read_text())["curve"]
        return found

    assert curve("--l_norms=L2", "--curve=0.1 2/5 1")["L2"][1][0] == 0.1
    several = curve("--curve=L1:6,1 Linf:1/16", "--l_eps=0.1 0.4 2")
    assert [[eps for eps, _ in rows] for rows in several.values()] == [[0.0, 0.0625, 0.1], [0.0, 1.0, 2.0, 6.0]]
    for rows in (*several.values(), *curve("--curve").values()):
        accuracies = [accuracy for _, accuracy in rows]
        assert accuracies == sorted(accuracies, reverse=True)
        assert accuracies[0] > accuracies[-1]
    before = curve("--curve=L1:6")
    assert curve("--curve=L1:6", "--resume") == before
    with pytest.raises(SystemExit):
        curve("--curve=L1:7", "--resume")
