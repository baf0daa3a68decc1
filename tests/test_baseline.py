"""--baseline is checked before the first pass: a bad one is one line, exit code 2 and no folder."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import eval as eval_script
from models import build_model

GOOD: dict[str, Any] = {
    "settings": {"dataset": "digits", "n_ex": 4, "image_size": None},
    "norms": {"Linf": {"eps": 0.1}},
    "outcomes": {"clean": [1, 1, 0, 1], "Linf": [0, 1, 0, 0], "union": [0, 1, 0, 0]},
}
FLAGS = ["--model_name=net.pth", "--dataset=digits", "--n_ex=4", "--attacks=fast", "--n_iter=4", "--l_norms=Linf"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net = {"num_classes": 10, "in_channels": 1, "width": 4}
    state = build_model("preact-resnet18", **net).state_dict()
    torch.save({"spec": {"arch": "preact-resnet18", "act": "softplus1", **net}, "state_dict": state}, "net.pth")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"settings": 3}, "not an evaluation of 4"),
        ({"settings": {}}, "not an evaluation of 4"),
        ({"settings": {"dataset": "digits", "n_ex": 5}}, "not an evaluation of 4"),
        ({"settings": {"dataset": "digits", "n_ex": 4, "image_size": 32}}, "image_size is 32"),
        ({"outcomes": None}, "another version"),
        ({"outcomes": {}}, "another version"),
        ({"norms": []}, "another version"),
        ({"outcomes": {"clean": [1]}}, "not 4 numbers"),
        ({"outcomes": {"clean": "1101"}}, "not 4 numbers"),
        ({"outcomes": {"clean": [1, 1, 0, float("nan")]}}, "not 4 numbers"),
        ({"outcomes": {"clean": [1, 1, 0, 2]}}, "not 4 numbers"),
        ({"outcomes": {"clean": [1, 1, 0, [1]]}}, "not 4 numbers"),
        ({"outcomes": {"clean": [1, 1, 0, True]}}, "not 4 numbers"),
        ({"outcomes": {"clean": [1, 1, 0, 1], "L1": [None] * 4}}, "not 4 numbers"),
        ({"norms": {"Linf": {"eps": 0.2}}}, "radius in Linf is 0.2"),
        ({"norms": {"Linf": {"eps": "0.1"}}}, "radius in Linf is 0.1, here"),
        ({"norms": {"Linf": 0.1}}, "radius in Linf is None"),
        ({"norms": {}}, "radius in Linf is None"),
    ],
)
def test_a_bad_baseline_is_refused_first(
    change: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other.json").write_text(json.dumps(GOOD | change))
    monkeypatch.setattr(eval_script, "evaluate_and_report", lambda *_: pytest.fail("it was evaluated"))
    with pytest.raises(SystemExit) as stop:
        eval_script.main([*FLAGS, "--l_eps=0.1", "--baseline=other.json"])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert "--baseline" in error
    assert word in error
    assert not Path("results").exists()


@pytest.mark.parametrize("name", ["/dev/zero", "huge.json", "."])
def test_what_is_no_file_of_that_size_is_not_read(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("huge.json").touch()
    os.truncate("huge.json", 2**31)
    with pytest.raises(SystemExit):
        eval_script.main([*FLAGS, f"--baseline={name}"])
    assert capsys.readouterr().err.count("\n") == 1


def test_the_union_of_other_norms_is_not_compared() -> None:
    Path("other.json").write_text(json.dumps(GOOD | {"norms": {"Linf": {"eps": 0.1}, "L1": {"eps": 2.0}}}))
    folder = eval_script.main([*FLAGS, "--l_eps=0.1", "--baseline=other.json"])
    assert set(json.loads((folder / "eval.json").read_text())["difference_to_baseline"]) == {"clean", "Linf"}
