"""What RobustBench asks for, filled in; adversarial images as torch.load reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eval as eval_script
import train
from data import load_dataset
from evaluation.leaderboard import BLANK, FIELDS, gaps, robustbench_fields, robustbench_issue
from models.pretrained import load_model


def content(**settings: Any) -> dict[str, Any]:
    """An eval.json that a leaderboard would take."""
    row = {"accuracy": 50.123, "points": 10_000}
    return {
        "accuracy": {"clean": {"accuracy": 80.0}, "Linf": row, "L1": {**row, "upper_bound": True}},
        "norms": {"Linf": {"eps": 8 / 255}, "L1": {"eps": 12.0}},
        "settings": {"attacks": "autoattack", "dataset": "cifar10", "n_ex": 10_000, "model_name": "net.pth"} | settings,
        "warnings": [],
    }


def test_a_whole_evaluation_is_a_claim() -> None:
    assert gaps(content(), "Linf") == []
    fields = robustbench_fields(content(), "Linf")
    assert tuple(fields) == FIELDS
    assert (fields["eps"], fields["clean_acc"], fields["autoattack_acc"]) == ("8/255", "80.00", "50.12")
    assert fields["unreliable"] is False
    text = robustbench_issue(content(), "Linf")
    assert text.startswith("# Paper Information")
    for line in ("**Threat Model**: Linf", "**eps**: 8/255", "**Clean accuracy**: 80.00", "**Robust accuracy**: 50.12"):
        assert line in text
    assert "AutoAttack, 10000 test images" in text
    assert text.count(BLANK) == 8


@pytest.mark.parametrize(
    ("norm", "settings", "said"),
    [
        ("Linf", {"attacks": "quick"}, "--attacks=autoattack"),
        ("Linf", {"n_ex": 500}, "--n_ex=10000"),
        ("Linf", {"dataset": "imagenet", "n_ex": 5000}, "radius is 4/255, not 8/255"),
        ("L1", {}, "no leaderboard for L1 on cifar10"),
        ("Linf", {"dataset": "digits"}, "no leaderboard for Linf on digits"),
    ],
)
def test_what_is_missing_is_said_first(norm: str, settings: dict[str, Any], said: str) -> None:
    missing = gaps(content(**settings), norm)
    assert len(missing) == 1
    assert said in missing[0]
    assert said in robustbench_issue(content(**settings), norm).splitlines()[0]


def test_a_warning_is_told() -> None:
    found = content() | {"warnings": ["gradients are zero"]}
    assert "gradients are zero" in robustbench_issue(found, "Linf").splitlines()[0]
    assert robustbench_fields(found, "Linf")["unreliable"] is True
    assert "50.12 (upper bound)" in robustbench_issue(content(), "L1")


def test_files_of_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = train.main(["--dataset=digits", "--width=4", "--epochs=2", "--device=cpu"])
    flags = [f"--model_name={run}/ep_2.pth", "--n_ex=30", "--attacks=fast", "--n_iter=8", "--robustbench_json"]
    folder = eval_script.main([*flags, "--device=cpu"])
    assert not list(folder.glob("*.pt"))
    folder = eval_script.main([*flags, "--device=cpu", "--save_adv=pt"])
    found = json.loads((folder / "eval.json").read_text())
    model, y = load_model(str(run / "ep_2.pth"), "", "digits").model.eval(), load_dataset("digits", "").test.labels[:30]
    for norm, radius in (("Linf", "0.1"), ("L2", "0.4"), ("L1", "2")):
        assert f"**eps**: {radius}" in (folder / f"issue_{norm}.md").read_text()
        assert json.loads((folder / f"robustbench_{norm}.json").read_text())["eps"] == radius
        saved = torch.load(folder / f"adv_{norm}_{radius}.pt", weights_only=True)
        assert (saved["norm"], saved["eps"]) == (norm, float(radius))
        assert np.array_equal(saved["x_adv"].numpy(), np.load(folder / f"adv_{norm}_{radius}.npy"))
        assert torch.equal(saved["y"], y)
        assert 0 < saved["broken"].sum() < 30
        robust = model(saved["x_adv"]).argmax(1) == y
        assert torch.equal(robust.int(), torch.tensor(found["outcomes"][norm]).int())
        assert not (robust & saved["broken"]).any()
