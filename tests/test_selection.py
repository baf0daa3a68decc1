"""--n_ex_val and --select: training images that are kept out of training choose best.pth; test images never do."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import eval as eval_script
import train
from data import load_dataset
from training.metrics import best_networks
from utils.checkpoint import load_tensors
from utils.signals import Interrupted

FLAGS = [
    "--dataset=digits",
    "--device=cpu",
    "--threads=1",
    "--width=4",
    "--batch_size=64",
    "--attack=apgd",
    "--at_iter=2",
]
FLAGS += ["--n_ex_val=60", "--eval_freq=1", "--n_ex_eval=20", "--eval_norms=Linf L1", "--select=union", "--epochs=4"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_last_images_are_kept_out() -> None:
    whole = load_dataset("digits", "")
    data = whole.hold_out(60)
    assert data.val is not None
    assert (len(data.train), len(data.val)) == (len(whole.train) - 60, 60)
    assert torch.equal(torch.cat([data.train.images, data.val.images]), whole.train.images)  # type: ignore[union-attr]
    assert torch.equal(torch.cat([data.train.labels, data.val.labels]), whole.train.labels)
    with pytest.raises(ValueError, match="can't be kept out"):
        whole.hold_out(len(whole.train))


def test_best_is_the_network_of_the_best_epoch_also_after_a_resume(cut_off: Callable[..., None]) -> None:
    folder = train.main([*FLAGS, "--ema=0.5", "--save_freq=1"])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for suffix in ("", "_ema"):
        values = [record[f"eval{suffix}"]["val"]["union"]["accuracy"] for record in records]
        assert all(record[f"eval{suffix}"]["val"]["union"]["points"] == 60 for record in records)
        epoch = values.index(max(values)) + 1
        best, same = (load_tensors(folder / f"{name}{suffix}.pth") for name in ("best", f"ep_{epoch}"))
        assert best["epoch"] == epoch
        assert all(torch.equal(value, same["state_dict"][name]) for name, value in best["state_dict"].items())
    cut_off(60, *FLAGS, "--ema=0.5", "--save_dir=cut", "--save_every=0.00001")
    [cut] = Path("cut").iterdir()
    train.main([f"--resume={cut}"])
    one, other = (load_tensors(path / "best.pth") for path in (folder, cut))
    assert one["epoch"] == other["epoch"]
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())


def record(value: float | None, suffix: str = "") -> dict[str, Any]:
    return {f"eval{suffix}": {"val": {"union": {"accuracy": value}}}} if value is not None else {}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0], [""]),
        ([1.0, 1.0], []),
        ([1.0, 2.0], [""]),
        ([2.0, None, 1.0], []),
        ([2.0, None], []),
        ([None, 0.0], [""]),
    ],
)
def test_the_first_of_equal_epochs_is_kept(values: list[float | None], expected: list[str]) -> None:
    records = [record(value) for value in values]
    assert best_networks(records, "union") == expected
    assert best_networks(records, None) == []
    assert best_networks([each | record(3.0, "_ema") for each in records[-1:]], "union")[-1] == "_ema"


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--select=union"], "--n_ex_val"),
        (["--select=union", "--n_ex_val=10"], "--eval_freq"),
        (["--n_ex_val=10"], "--eval_freq"),
        (["--select=best", "--n_ex_val=10", "--eval_freq=1"], "choose union"),
        (["--n_ex_val=100000", "--eval_freq=1"], "can't be kept out"),
        (["--n_ex_val=10", "--eval_freq=1", "--n_ex_train=1297"], "--n_ex_train"),
    ],
)
def test_usage_errors(flags: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["--dataset=digits", "--attack=apgd", "--device=cpu", *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert word in error


def test_the_final_evaluation_is_of_the_best_network_also_after_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*FLAGS, "--final_eval", "--n_ex_final=30", "--eval_norms=L1", "--select=clean", "--lr-max=3"]
    folder = train.main(flags)
    assert load_tensors(folder / "best.pth")["epoch"] < 4  # at this learning rate the last network is not the best
    result = json.loads((folder / "eval.json").read_text())
    assert result["settings"]["model_name"] == str(folder / "best.pth")
    again = eval_script.main([f"--model_name={folder / 'best.pth'}", "--n_ex=30", "--l_norms=L1", "--device=cpu"])
    assert result["outcomes"] == json.loads((again / "eval.json").read_text())["outcomes"]

    def stop(_: object) -> None:  # after the attack on the best network, which the training state must not hold
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("training.evaluation.evaluation_json", stop)
        with pytest.raises(SystemExit):
            train.main([*flags, "--save_dir=cut"])
    [cut] = Path("cut").iterdir()
    train.main([f"--resume={cut}"])
    assert result["outcomes"] == json.loads((cut / "eval.json").read_text())["outcomes"]
    one, other = (load_tensors(path / "ep_4.pth")["state_dict"] for path in (folder, cut))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
