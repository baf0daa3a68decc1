"""Weights that others saved: found wherever they lie, with what was assumed said; nothing in a file hangs, runs or ends in a traceback."""

from __future__ import annotations

import argparse
import json
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import eval as eval_script
import train
from models import build_model
from models.from_file import NetworkFlags
from models.normalization import NORMALIZATIONS, Normalized
from models.pretrained import load_model
from models.weights import normalization_in, weights_in
from utils.checkpoint import load_tensors, save_atomic

SPEC = {"arch": "preact-resnet18", "num_classes": 10, "in_channels": 3, "width": 4}
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_model(**SPEC).eval()


def other_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return build_model(**SPEC).state_dict()


def under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": each for name, each in state.items()}


def itself(content: dict[str, Any]) -> dict[str, Any]:
    content["model"] = content
    return content


FORMS: dict[str, Any] = {
    "plain": lambda s: s,
    "ordered": OrderedDict,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "deep": lambda s: {"a": {"b": {"c": {"model": s}}}},
    "module": lambda s: under("module.", s),
    "twice": lambda s: {"model": under("module.model.", s)},
    "compiled": lambda s: under("_orig_mod.", s),
    "an attribute of a trainer": lambda s: {"state_dict": under("net.encoder.", s)},
    "beside a head": lambda s: {"state_dict": under("backbone.", s) | {"projector.weight": torch.zeros(3, 3)}},
    "beside numbers": lambda s: {**s, "epoch": 3, "best": torch.tensor(0.3)} | {"state_dict": s},
    "with an optimizer": lambda s: {"net": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "numpy scalars": lambda s: {"state_dict": s, "acc": np.float64(0.5), "epoch": np.int64(3), "a": np.arange(3)},
    "argparse": lambda s: {"state_dict": s, "args": argparse.Namespace(lr=0.1, opt=argparse.Namespace(a=[1]))},
    "fields of other types": lambda s: {"state_dict": s, "dataset": ["x"], "image_size": "big", "epoch": "last"},
    "a spec that is none": lambda s: {"state_dict": s, "spec": ["preact"]},
    "that holds itself": lambda s: itself({"weights": s}),
    "old counters": lambda s: {name: each for name, each in s.items() if not name.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found(form: str, network: nn.Module) -> None:
    torch.save(FORMS[form](network.state_dict()), "net.pth")
    loaded = load_model("net.pth", ".", "cifar10")
    assert torch.equal(loaded.model.eval()(IMAGES), network(IMAGES))
    assert "taken for a PreAct ResNet-18, softplus1, no input normalisation" in loaded.notes[0]
    assert ("projector.weight" in " ".join(loaded.notes)) == (form == "beside a head")


@pytest.mark.parametrize("form", ["plain", "deep", "beside a head", "argparse", "that holds itself"])
def test_weights_of_ones_own_network_are_found_too(form: str) -> None:
    Path("nets.py").write_text("import torch\n\n\ndef make():\n    return torch.nn.Sequential(torch.nn.Linear(3, 2))\n")
    state = {"0.weight": torch.ones(2, 3), "0.bias": torch.zeros(2)}
    torch.save(FORMS[form](state), "net.pth")
    model = load_model("nets.py:make@net.pth", ".", "cifar10").model
    assert torch.equal(model(torch.ones(1, 3)), torch.full((1, 2), 3.0))


def test_weights_chooses_where_there_are_several(network: nn.Module) -> None:
    content = {"state_dict_ema": network.state_dict(), "state_dict": other_weights(), "ema": {"decay": torch.ones(1)}}
    torch.save(content, "net.pth")
    usual = load_model("net.pth", ".", "cifar10")
    assert "in state_dict, state_dict_ema: state_dict is taken (--weights=NAME" in " ".join(usual.notes)
    assert not torch.equal(usual.model.eval()(IMAGES), network(IMAGES))
    ema = load_model("net.pth", ".", "cifar10", NetworkFlags(weights="ema"))
    assert torch.equal(ema.model.eval()(IMAGES), network(IMAGES))
    assert len(ema.notes) == 1
    with pytest.raises(ValueError, match="'swa'; there are 'state_dict_ema', 'state_dict'"):
        load_model("net.pth", ".", "cifar10", NetworkFlags(weights="swa"))


def test_input_normalisation_by_flags_and_in_files(network: nn.Module) -> None:
    mean, std = NORMALIZATIONS["cifar10"]
    expected = Normalized(network, mean, std).eval()(IMAGES)
    torch.save(network.state_dict(), "net.pth")
    for flags in (NetworkFlags(mean="cifar10"), NetworkFlags(std="cifar10"), NetworkFlags(mean=mean, std=std)):
        loaded = load_model("net.pth", ".", "cifar10", flags)
        assert torch.equal(loaded.model.eval()(IMAGES), expected)
        assert "input normalisation with mean 0.4914 0.4822 0.4465 and std 0.2471" in loaded.notes[0]
    for before, names in (("normalize.", ("mean", "std")), ("", ("mu", "sigma"))):
        pair = {f"{before}{n}": torch.tensor(v)[:, None, None] for n, v in zip(names, (mean, std), strict=True)}
        torch.save(pair | under("1." if before else "", network.state_dict()), "theirs.pth")
        theirs = load_model("theirs.pth", ".", "cifar10")
        assert torch.allclose(theirs.model.eval()(IMAGES), expected, atol=1e-6)
        assert "input normalisation with mean 0.4914" in theirs.notes[0]
    assert normalization_in(network.state_dict())[1] is None
    for flags in (NetworkFlags(mean=(0.5,)), NetworkFlags(mean=(0.5, 0.5), std=(1.0,))):
        with pytest.raises(ValueError, match="--std"):
            load_model("net.pth", ".", "cifar10", flags)


def test_what_was_trained_with_flags_keeps_them(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--dataset=digits",
        "--device=cpu",
        "--width=4",
        "--epochs=3",
        "--n_ex_train=600",
        "--mean=0.3",
        "--std=0.4",
    ]
    folder = train.main([*flags, "--act=relu"])
    content = load_tensors(folder / "ep_3.pth")
    assert {key: content["spec"][key] for key in ("act", "mean", "std")} == {"act": "relu", "mean": [0.3], "std": [0.4]}
    name = f"--model_name={folder}/ep_3.pth"
    quick = ["--n_ex=50", "--only_clean", "--device=cpu"]
    ours = json.loads((eval_script.main([name, *quick]) / "eval.json").read_text())["outcomes"]
    assert "taken for" not in capsys.readouterr().out
    torch.save({name.removeprefix("model."): v for name, v in content["state_dict"].items() if "." in name}, "w.pth")
    same = ["--model_name=w.pth", "--dataset=digits", *quick, "--act=relu", "--mean=0.3", "--std=0.4"]
    assert json.loads((eval_script.main(same) / "eval.json").read_text())["outcomes"] == ours
    assert "taken for a PreAct ResNet-18, relu, input normalisation with mean 0.3" in capsys.readouterr().out
    other = json.loads((eval_script.main(same[:-2]) / "eval.json").read_text())["outcomes"]
    assert other != ours
    with pytest.raises(SystemExit):
        eval_script.main([name, *quick, "--mean=0.2", "--std=0.4"])
    assert "it was trained with --mean=[0.3], leave that flag out" in capsys.readouterr().err


HUGE = torch.zeros(1).expand(10**7, 10**7)  # a file of some hundred bytes

REFUSED: dict[str, tuple[Any, str]] = {
    "a list": ([1, 2], "no state dict"),
    "nothing": ({}, "no state dict"),
    "an empty one in itself": (itself({}), "no state dict"),
    "more than any network": ({"conv1.weight": HUGE}, r"more than 3e\+09 weights"),
    "other dimensions": ({"conv1.weight": torch.zeros(()), "linear.weight": 0}, "another network"),
    "names of ours with no shapes": (
        {name: torch.zeros(()) for name in ("conv1.weight", "linear.weight", "layer1.0.bn1.weight")},
        "another network",
    ),
    "a width of no network": (
        {"spec": SPEC | {"width": 10**15}, "state_dict": {"a": torch.zeros(1)}},
        "fits none here",
    ),
    "a width below zero": ({"spec": SPEC | {"width": -3}, "state_dict": {"a": torch.zeros(1)}}, "fits none here"),
    "a width in words": ({"spec": SPEC | {"width": "wide"}, "state_dict": {"a": torch.zeros(1)}}, "fits none here"),
    "a field that is none": ({"spec": SPEC | {"depth": 3}, "state_dict": {"a": torch.zeros(1)}}, "fits none here"),
    "no arch": ({"spec": {"width": 3}, "state_dict": {"a": torch.zeros(1)}}, "fits none here"),
    "an arch that is a list": (
        {"spec": {"arch": [1]}, "state_dict": {"a": torch.zeros(1)}},
        "another network|fits none|unknown",
    ),
    "a mean in words": (
        {"spec": SPEC | {"mean": "x", "std": [1.0]}, "state_dict": {"a": torch.zeros(1)}},
        "no mean and standard deviation",
    ),
    "a std of zero": (
        {"spec": SPEC | {"mean": [0.0], "std": [0.0]}, "state_dict": {"a": torch.zeros(1)}},
        "no mean and standard deviation",
    ),
    "a sparse tensor": ({"a": torch.eye(3).to_sparse()}, "no state dict"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_that_holds_no_network_gives_one_line(what: str) -> None:
    content, words = REFUSED[what]
    save_atomic(content, Path("net.pth"))
    start = time.monotonic()
    with pytest.raises(ValueError, match=words) as error:
        load_model("net.pth", ".", "cifar10")
    assert "net.pth" in str(error.value)
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 20


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def test_code_in_a_file_does_not_run() -> None:
    torch.save({"state_dict": other_weights(), "extra": Runs()}, "net.pth")
    with pytest.raises(ValueError, match=r"holds Python objects beside tensors; loading it could run code"):
        load_model("net.pth", ".", "cifar10")
    assert not Path("ran").exists()


class Hostile:
    """numpy's dtype of Python objects with the state of plain bytes, and a scalar of it: an address of the file's choice."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.float64(0).__reduce__()[0], (np.dtype("O"), b"\x41" * 8)


class HostileArray:
    def __reduce__(self) -> tuple[Any, ...]:
        return np.ndarray, ((1,), "O", b"\x41" * 8)


@pytest.mark.parametrize("kind", [Hostile, HostileArray])
def test_numbers_in_a_file_are_no_addresses(kind: type) -> None:
    torch.save({"state_dict": other_weights(), "extra": kind()}, "net.pth")
    try:
        content = load_tensors(Path("net.pth"))["extra"]
    except ValueError:
        return
    assert not isinstance(content, np.ndarray | np.generic)


def test_the_search_is_bounded() -> None:
    """Also in a file of many parts, of which each leads to all others."""
    parts: list[dict[str, Any]] = [{} for _ in range(300)]
    for part in parts:
        part |= {str(number): other for number, other in enumerate(parts)}
    start = time.monotonic()
    with pytest.raises(ValueError, match="no state dict"):
        weights_in(parts[0])
    assert time.monotonic() - start < 10


def test_a_data_set_of_others_is_not_trusted(network: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": network.state_dict(), "spec": SPEC | {"act": "relu"}, "dataset": "CIFAR-10"}, "net.pth")
    with pytest.raises(SystemExit):
        eval_script.main(["--model_name=net.pth", "--only_clean", "--device=cpu", "--data_dir=/dev/null/none"])
    out, error = capsys.readouterr()
    assert "names the data set 'CIFAR-10', which is none here: cifar10 is taken" in out
    assert error.count("\n") == 1
    assert "--data_dir" in error
