"""--save_adv=pt: the images as a dictionary of torch.save, the same as the .npy's, after one process, two, and a resumed end."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eval as eval_script
from attacks.norms import NORMS
from data import load_dataset
from evaluation import images as images_module
from evaluation.storage import Store

N = 20
FLAGS = ["--model_name=nets.py:make", "--dataset=digits", f"--n_ex={N}", "--n_iter=5", "--attacks=fast", "--device=cpu"]
FLAGS += ["--l_norms=Linf L1", "--l_eps=0.05 1.5", "--threads=1"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x, y = load_dataset("digits", "").train.pixels()
    means = torch.stack([x[y == k].mean(0).flatten() for k in range(10)])
    torch.save({"weight": means.double(), "bias": -means.double().square().sum(1) / 2}, "means.pth")
    Path("nets.py").write_text(
        "import torch\n\n\ndef make():\n    layer = torch.nn.Linear(64, 10).double()\n"
        "    layer.load_state_dict(torch.load('means.pth'))\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), InFloat64(layer))\n\n\n"
        "class InFloat64(torch.nn.Module):\n    def __init__(self, layer):\n        super().__init__()\n"
        "        self.layer = layer\n\n    def forward(self, x):\n        return self.layer(x.double())\n"
    )


def saved(folder: Path) -> dict[str, dict[str, Any]]:
    """The .pt files by name, loaded as a user loads them."""
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))}


def test_the_dictionary() -> None:
    folder = eval_script.main([*FLAGS, "--save_adv=pt"])
    found, content = saved(folder), json.loads((folder / "eval.json").read_text())
    assert list(found) == ["adv_L1_1.5.pt", "adv_Linf_0.05.pt"]
    clean, labels = load_dataset("digits", "").test.take(N).pixels()
    means = torch.load("means.pth")
    for name, each in found.items():
        assert set(each) == {"adv_inputs", "labels", "save_type", "broken", "norm", "eps"}
        norm, x_adv, broken = each["norm"], each["adv_inputs"], each["broken"]
        assert each["eps"] == content["norms"][norm]["eps"]
        assert name == f"adv_{norm}_{each['eps']:g}.pt"
        assert torch.equal(each["labels"], labels)
        assert each["labels"].untyped_storage().nbytes() == 8 * N  # not those of all test images
        assert x_adv.dtype == torch.float32
        np.testing.assert_array_equal(x_adv.numpy(), np.load(folder / name.replace(".pt", ".npy")))
        assert broken.tolist() == [run is not None for run in content["norms"][norm]["broken_by_run"]]
        assert 0 < int(broken.sum()) < N
        wrong = (x_adv.flatten(1).double() @ means["weight"].T + means["bias"]).argmax(1) != labels
        assert bool((wrong | ~broken).all())
        assert [1 - right for right in content["outcomes"][norm]] == wrong.int().tolist()
        assert torch.equal(x_adv[~broken], clean[~broken])
        size = {"Linf": float("inf"), "L1": 1}[norm]
        assert bool((torch.linalg.vector_norm((x_adv - clean).flatten(1), size, 1) < each["eps"] * 1.0001).all())


def test_npy_alone_is_the_default() -> None:
    folder = eval_script.main(FLAGS)
    assert sorted(path.name for path in folder.glob("adv_*")) == ["adv_L1_1.5.npy", "adv_Linf_0.05.npy"]


def test_an_evaluation_that_was_ended_or_is_over_writes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved(eval_script.main([*FLAGS, "--save_adv=pt", "--save_dir=whole"]))
    with monkeypatch.context() as patch:
        patch.setattr(Store, "restore_clean", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            eval_script.main([*FLAGS, "--save_adv=pt"])
    [folder] = Path("results").iterdir()
    assert not saved(folder)
    assert eval_script.main([*FLAGS, "--save_adv=pt", "--resume"]) == folder
    assert eval_script.main([*FLAGS, "--save_dir=later"]).parent == Path("later")
    later = eval_script.main([*FLAGS, "--save_dir=later", "--save_adv=pt", "--resume"])  # all was done, but this file
    for found in (saved(folder), saved(later)):
        assert list(found) == list(whole)
        for name, each in found.items():
            for key, value in each.items():
                assert torch.equal(value, whole[name][key]) if torch.is_tensor(value) else value == whole[name][key]


def test_two_processes_write_it_once(launch: Callable[..., ForkServerProcess]) -> None:
    whole = saved(eval_script.main([*FLAGS, "--save_adv=pt", "--save_dir=whole"]))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = [address | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    flags = [*FLAGS, "--save_adv=pt"]
    both = [launch(*flags, script="eval", out=f"out{rank}", environment=ranks[rank]) for rank in range(2)]
    for process in both:
        process.join()
    [folder] = Path("results").iterdir()
    found = saved(folder)
    assert list(found) == list(whole)
    for name, each in found.items():
        assert torch.equal(each["adv_inputs"], whole[name]["adv_inputs"])
        assert torch.equal(each["broken"], whole[name]["broken"])


def test_a_full_disk_leaves_no_part(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The images go from file to file: what is asked of the disk first is all that is written."""
    asked = []

    def full(file: int, size: int) -> None:
        asked.append(size)
        if len(asked) > 2:  # the two .npy files, then the first .pt
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(images_module, "allocate", full)
        with pytest.raises(SystemExit) as stop:
            eval_script.main([*FLAGS, "--save_adv=pt"])
    assert stop.value.code == 1
    assert "No space left" in capsys.readouterr().err
    [folder] = Path("results").iterdir()
    assert not [*folder.glob("*.pt"), *folder.glob("*.part")]
    assert (folder / "eval.json").exists()
    again = eval_script.main([*FLAGS, "--save_adv=pt", "--resume"])
    for path in again.glob("*.pt"):
        assert path.stat().st_size <= asked[2]


def test_every_norm_has_its_file() -> None:
    flags = [flag for flag in FLAGS if not flag.startswith("--l_")]
    folder = eval_script.main([*flags, "--save_adv=pt", "--union_only"])
    assert {each["norm"] for each in saved(folder).values()} == set(NORMS)
