"""A new last layer for other classes: which layer it replaces, how it is trained, saved, resumed and evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import eval as eval_script
import train
from data import DATASETS, Dataset, DatasetSpec
from models import NETWORKS, build_model
from models.from_file import rebuild
from models.heads import AUTO, find_head, replace_head, with_new_head
from utils.checkpoint import load_tensors

FLAGS = ["--device=cpu", "--threads=1", "--attack=apgd", "--at_iter=2", "--n_ex_train=96", "--batch_size=32"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def load(name: str, *args: Any) -> Dataset:
        digits = DATASETS["digits"].load("digits", *args)
        train_, test = (replace(split, labels=split.labels % 3) for split in (digits.train, digits.test))
        return replace(digits, name=name, train=train_, test=test, class_names=("0", "1", "2"))

    monkeypatch.setitem(DATASETS, "thirds", DatasetSpec("thirds", "of digits", load, DATASETS["digits"].radii))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = f"--save_dir={tmp_path_factory.mktemp('start')}"
    return train.main(["--dataset=digits", "--width=4", *FLAGS, "--epochs=1", save]) / "ep_1.pth"


class OwnNet(nn.Module):
    """Its last layer is a convolution, and not the last module in the order of their names."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = nn.Conv2d(8, 7, 1)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.answer(self.body(x)).mean((2, 3))
        return logits


def networks() -> list[Any]:
    found = [
        pytest.param(lambda s=spec.small: build_model(**s, in_channels=3, num_classes=7), id=name)
        for name, spec in NETWORKS.items()
    ]
    found.append(pytest.param(OwnNet, id="convolution"))
    for name in ("resnet18", "mobilenet_v3_small"):
        make = getattr(torchvision.models, name)
        found.append(pytest.param(lambda make=make: make(num_classes=7), id=name))
    return found


@pytest.mark.parametrize("make", networks())
def test_the_last_layer_is_found_and_nothing_else_changes(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make().train(), torch.rand(2, 3, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    spec = with_new_head(model, {}, AUTO, (3, 32, 32), 5)
    assert spec["head_classes"] == 5
    assert [module.training for module in model.modules()] == modes
    assert model.eval()(x).shape == (2, 5)
    for name, value in model.state_dict().items():
        assert (
            name.startswith(f"{spec['head']}.") != torch.equal(value, before[name]) or value.shape != before[name].shape
        )
    assert find_head(model, (3, 32, 32)) == spec["head"]
    with torch.no_grad():
        model.get_submodule(spec["head"]).weight.zero_()  # type: ignore[operator, union-attr]
    assert (model(x).var(0) == 0).all()  # all logits come from it


def test_a_last_layer_that_gives_no_logits_itself_is_not_found() -> None:
    pooled = nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.Unflatten(1, (1, 12)), nn.MaxPool1d(3), nn.Flatten())
    with pytest.raises(ValueError, match="which has 4 outputs, was not found; name it, such as --head=1"):
        find_head(pooled, (3, 4, 4))


@pytest.mark.parametrize(
    ("name", "number"),
    [("body.1", 2), ("body.0", 2), ("nothing", 2), ("", 2), ("answer", 0), ("answer", 10**9), ("answer", True), (3, 2)],
)
def test_what_is_no_last_layer_is_refused(name: Any, number: int) -> None:
    with pytest.raises(ValueError, match=r"no linear layer|no last layer"):
        replace_head(OwnNet(), name, number)
    spec = {"arch": "preact-resnet18", "num_classes": 10, "in_channels": 1, "width": 1}
    with pytest.raises(ValueError, match=r"no linear layer|no last layer"):  # as a file may say
        rebuild(spec | {"head": name, "head_classes": number}, None)


def test_other_classes_get_a_new_last_layer_in_the_checkpoint(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune = ["--dataset=thirds", *FLAGS, "--finetune_model", f"--model_name={start}", "--epochs=2"]
    folder = train.main([*tune, "--final_eval", "--n_ex_final=20"])
    assert "new last layer with random weights: linear, 3 outputs" in capsys.readouterr().out
    saved = load_tensors(folder / "ep_2.pth")
    assert saved["state_dict"]["linear.weight"].shape[0] == 3
    result = eval_script.main([f"--model_name={folder}/ep_2.pth", "--n_ex=20", "--device=cpu"])
    one, other = (json.loads((path / "eval.json").read_text())["outcomes"] for path in (folder, result))
    assert one == other
    again = train.main(
        ["--dataset=digits", *FLAGS, "--finetune_model", f"--model_name={folder}/ep_2.pth", "--epochs=1"]
    )
    assert load_tensors(again / "ep_1.pth")["spec"] == saved["spec"] | {"head_classes": 10}


def test_the_same_classes_keep_it_unless_asked(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune = ["--dataset=digits", *FLAGS, "--finetune_model", f"--model_name={start}", "--epochs=1"]
    assert "head" not in load_tensors(train.main(tune) / "ep_1.pth")["spec"]
    assert "new last layer" not in capsys.readouterr().out
    assert load_tensors(train.main([*tune, "--head=auto"]) / "ep_1.pth")["spec"]["head"] == "linear"
    with pytest.raises(SystemExit):
        train.main([*tune, "--head_lr=2"])
    assert "--head=auto puts a new one in its place" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main([*tune, "--head=conv1"])
    assert "conv1 is no linear layer of the network; its last ones are" in capsys.readouterr().err


def test_frozen_epochs_train_the_last_layer_alone(start: Path, cut_off: Callable[..., None]) -> None:
    tune = ["--dataset=thirds", *FLAGS, "--finetune_model", f"--model_name={start}", "--epochs=3", "--save_freq=1"]
    tune += ["--freeze_epochs=2", "--head_lr=3", "--lr-schedule=piecewise-1", "--lr-max=0.01"]
    folder = train.main(tune)
    first, *epochs = (load_tensors(path)["state_dict"] for path in (start, *sorted(folder.glob("ep_*.pth"))))
    changed = [{name for name, value in state.items() if not torch.equal(value, first[name])} for state in epochs]
    assert changed[0] == changed[1] == {"linear.weight", "linear.bias"}
    assert not torch.equal(epochs[0]["linear.weight"], epochs[1]["linear.weight"])
    assert changed[2] >= {"conv1.weight", "bn.running_mean", "linear.weight"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx([0.01] * 3)
    for steps in (2, 4, 7):  # in the first and the second frozen epoch, and after them
        cut_off(steps, *tune, f"--save_dir=cut{steps}", "--save_every=0.00001")
        [cut] = Path(f"cut{steps}").iterdir()
        train.main([f"--resume={cut}"])
        resumed = load_tensors(cut / "ep_3.pth")["state_dict"]
        assert all(torch.equal(value, resumed[name]) for name, value in epochs[2].items())


def test_the_backbone_starts_without_momentum(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = train.optimizer_step

    def spy(optimizer: torch.optim.Optimizer, *more: Any) -> None:
        backbone, head = optimizer.param_groups
        states = [optimizer.state.get(group["params"][0], {}) for group in (backbone, head)]
        seen.append((backbone["lr"], round(head["lr"] / 3, 6), *("momentum_buffer" in state for state in states)))
        step(optimizer, *more)

    monkeypatch.setattr(train, "optimizer_step", spy)
    tune = ["--dataset=thirds", *FLAGS, "--finetune_model", f"--model_name={start}", "--epochs=2", "--freeze_epochs=1"]
    train.main([*tune, "--head_lr=3", "--lr-schedule=piecewise-1", "--lr-max=0.01"])
    assert seen[0] == (0, 0.01, False, False)
    assert seen[2][:3] == (0, 0.01, True)  # three steps in an epoch
    assert seen[3] == (0.01, 0.01, False, True)
