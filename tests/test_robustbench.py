"""--robustbench_json: the fields of today's model_info, and the text of an issue, honest about what the figure is not."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import eval as eval_script
from evaluation.robustbench import BOARDS, FIELDS, IMAGES, issue_text, robustbench_fields, shortfalls
from models import build_model, robustbench_zoo

# The keys of RobustBench's model_info/cifar10/Linf/Bartoldson2024Adversarial_WRN-94-16.json, in turn.
TODAY = "link name authors additional_data number_forward_passes dataset venue architecture eps clean_acc reported autoattack_acc"
TODAY += " footnote unreliable"
LABELS = ["Paper Title", "Paper URL", "Paper authors", "Architecture", "Threat Model", "eps", "Clean accuracy"]
LABELS += ["Robust accuracy", "Additional data", "Evaluation method", "Checkpoint and code"]  # of its issue template


def content(
    norm: str = "Linf", eps: float = 8 / 255, row: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """eval.json of a network on all CIFAR-10 test images with AutoAttack's attacks."""
    usual = {
        "dataset": "cifar10",
        "n_ex": 10_000,
        "attacks": "autoattack",
        "n_iter": 100,
        "n_restarts": None,
        "n_targets": None,
    }
    return {
        "settings": usual | settings,
        "accuracy": {"clean": {"accuracy": 82.1, "low": 81.3, "high": 82.8},
                     norm: {"accuracy": 48.1, "low": 47.1, "high": 49.1} | (row or {})},
        "norms": {norm: {"eps": eps}},
        "network": {"arch": "wide-resnet-28-10", "act": "relu"},
        "warnings": [],
        "environment": {"command": ["eval.py", "--model_name=a b.pth"], "commit": "c0ffee", "packages": {"torch": "2.6"}, "device": "cpu"},
    }  # fmt: skip


def test_the_fields_are_todays() -> None:
    assert " ".join(FIELDS) == TODAY
    with robustbench_zoo._importable():
        from robustbench.utils import ModelInfo
    theirs = {each.name for each in dataclasses.fields(ModelInfo) if not each.name.startswith("corruptions")}
    assert set(FIELDS) == theirs | {"unreliable"}


def test_the_boards_are_its_model_zoos() -> None:
    with robustbench_zoo._importable():
        from robustbench.model_zoo import model_dicts
    zoo = {(dataset.value, threat.value) for dataset, each in model_dicts.items() for threat in each}
    assert set(BOARDS) == {(dataset, norm) for dataset, norm in zoo if not norm.startswith("corruptions")}
    assert set(IMAGES) == {dataset for dataset, _ in BOARDS}


def test_what_is_known_is_filled_in() -> None:
    fields = robustbench_fields(content(), "Linf")
    known = {"number_forward_passes": 1, "dataset": "cifar10", "architecture": "wide-resnet-28-10", "eps": "8/255"}
    known |= {"clean_acc": "82.10", "autoattack_acc": "48.10", "footnote": "10000 test images"}
    assert {key: value for key, value in fields.items() if value is not None} == known
    assert list(fields) == list(FIELDS)
    bounded = robustbench_fields(content(row={"upper_bound": True}), "Linf")
    assert bounded["autoattack_acc"] is None  # the board reads it as a number
    assert "48.10 (upper bound)" in bounded["footnote"]
    standard = robustbench_fields(content(attacks="standard"), "Linf")
    assert standard["autoattack_acc"] is None
    assert standard["footnote"] == "10000 test images; 48.10 under the standard attacks, not AutoAttack"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"attacks": "standard"}, []),
        ({"norm": "L2", "eps": 0.5}, []),
        ({"attacks": "quick"}, ["--attacks=quick"]),
        ({"attacks": "fast", "row": {"upper_bound": True}}, ["--attacks=fast", "upper bound"]),
        ({"n_iter": 20, "n_targets": 3}, ["--n_iter=20", "--n_targets=3"]),
        ({"row": {"not_finite": 3}}, ["NOT FINITE at 3"]),
        ({"n_ex": 1000}, ["1000 of 10000 test images"]),
        ({"eps": 4 / 255}, ["the radius is 4/255, the board's 8/255"]),
        ({"norm": "L1", "eps": 12.0}, ["there is no board of L1 on cifar10"]),
        ({"norm": "L2", "eps": 0.5, "dataset": "cifar100"}, ["there is no board of L2 on cifar100"]),
        ({"dataset": "imagenet", "eps": 4 / 255, "n_ex": 5000}, ["5000 images, not the board's 5000, a choice of its own"]),
    ],
)  # fmt: skip
def test_the_first_line_says_what_the_figure_is_not(change: dict[str, Any], said: list[str]) -> None:
    norm, made = change.get("norm", "Linf"), content(**change)
    assert shortfalls(made, norm) == said
    first, *rest = issue_text(made, norm).splitlines()
    assert first.startswith("**Not the figure of a board:** ") == bool(said)
    assert all(part in first.replace("\\", "") for part in said)
    assert "RobustBench runs AutoAttack itself" in "".join(rest)


def test_the_issue_has_the_templates_headings_and_marks_what_is_missing() -> None:
    text = issue_text(content(), "Linf")
    headings = [
        "# Paper Information",
        "# Leaderboard Claim(s)",
        "## Model 1",
        "# Model Zoo:",
        "# Additional information",
    ]
    assert re.findall(r"^#+ .*$", text, re.MULTILINE) == headings
    found = dict(re.findall(r"^- \*\*(.+?)\*\*: (.*)$", text, re.MULTILINE))
    assert [label for label in found if label in LABELS] == LABELS
    blank = {label for label, value in found.items() if "**TO FILL IN**" in value}
    assert blank == {"Paper Title", "Paper URL", "Paper authors", "Venue", "Additional data", "Checkpoint and code"}
    assert (found["Threat Model"], found["eps"], found["Robust accuracy"]) == ("Linf", "8/255", "48.10")
    assert len(re.findall(r"^- \[ \] \*\*TO FILL IN\*\*", text, re.MULTILINE)) == 3
    assert "python eval.py '--model_name=a b.pth'" in text
    of_code = content() | {"network": {"arch": "function", "function": "net.py:make"}, "warnings": ["few *runs*\nhere"]}
    text = issue_text(of_code, "Linf")
    assert "- **Architecture**: **TO FILL IN**" in text
    assert "- **Warning of the evaluation**: few \\*runs\\*\\nhere" in text.replace("\\\\n", "\\n")


def test_eval_writes_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net = {"num_classes": 10, "in_channels": 1, "width": 4}
    state = build_model("preact-resnet18", **net).state_dict()
    torch.save({"spec": {"arch": "preact-resnet18", "act": "softplus1", **net}, "state_dict": state}, "net.pth")
    flags = ["--model_name=net.pth", "--dataset=digits", "--n_ex=4", "--attacks=fast", "--n_iter=4", "--device=cpu"]
    folder = eval_script.main([*flags, "--l_norms=Linf L1", "--robustbench_json"])
    rows = json.loads((folder / "eval.json").read_text())["accuracy"]
    for norm in ("Linf", "L1"):
        fields = json.loads((folder / f"robustbench_{norm}.json").read_text())
        assert list(fields) == list(FIELDS)
        assert fields["architecture"] == "preact-resnet18"
        text = (folder / f"issue_{norm}.md").read_text()
        assert f"**Robust accuracy**: {rows[norm]['accuracy']:.2f} (upper bound)" in text
        assert text.startswith(
            "**Not the figure of a board:** --attacks=fast; --n\\_iter=4; upper bound; there is no board"
        )
