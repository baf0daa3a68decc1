"""The example against the repository: the same points, the same weights; and its own parts and command line."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.datasets import CIFAR10

from attacks.apgd import apgd
from attacks.threat import Threat
from data import BatchLoader, load_dataset
from models import build_model

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "minimal_eat.py"
# The images of these tests are not CIFAR-10's, so torchvision must not compare their digests.
UNCHECKED = "import torchvision.datasets.cifar; torchvision.datasets.cifar.check_integrity = lambda *_: True"
# train.py in float64: `.float()` is what makes images and logits float32. Each draw of a norm is written down.
TRAIN = """
import json, sys, torch
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
multinomial, draws = torch.multinomial, []
def noted(chances, *args, **kwargs):
    drawn = multinomial(chances, *args, **kwargs)
    draws.append((chances.tolist(), drawn.tolist()[0]))
    return drawn
torch.multinomial = noted
import train
train.main(sys.argv[2:])
json.dump(draws, open(sys.argv[1], "w"))
"""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as a module."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import minimal_eat

    return minimal_eat


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New tensors are float64, and so is what `.float()` makes."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files like CIFAR-10's, of 8 random images each; the class says how bright and how reddish they are."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    place, draws = tmp_path / CIFAR10.base_folder, np.random.default_rng(0)
    place.mkdir()
    for file, _ in CIFAR10.train_list + CIFAR10.test_list:
        labels = draws.integers(10, size=8)
        images = draws.integers(0, 256, (8, 3, 1024)) // 2 + 12 * labels[:, None, None] * np.array([[[1], [0], [0]]])
        content = {"data": images.reshape(8, 3072).clip(0, 255).astype(np.uint8), "labels": labels.tolist()}
        (place / file).write_bytes(pickle.dumps(content))
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(k) for k in range(10)]}))
    return tmp_path


def run(code: str, *args: str, **kwargs: object) -> str:
    """What Python prints when it runs the code with these arguments in the repository's folder."""
    command = [sys.executable, "-c", f"{UNCHECKED}\n{code}", *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_is_short_and_stands_alone() -> None:
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 150
    names = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    names |= {a.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for a in node.names}
    known = sys.stdlib_module_names | {"torch", "torchvision"}
    assert {str(name).split(".")[0] for name in names} <= known


@pytest.mark.parametrize("width", [2, 16])
def test_the_network_is_the_same(width: int, example: ModuleType, float64: None) -> None:
    torch.manual_seed(0)
    theirs = build_model("preact-resnet18", width=width)
    torch.manual_seed(0)
    model = example.preact_resnet18(width)
    assert list(model.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), theirs.parameters(), strict=True))
    x = torch.rand(4, 3, 32, 32)
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), theirs.train(mode)(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_iter", [1, 10, 50])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 1 / 8), ("L1", 2.5)])  # exact in float32, in which ours are kept
def test_apgd_finds_the_same_points(
    norm: str, eps: float, n_iter: int, example: ModuleType, monkeypatch: pytest.MonkeyPatch, trained: nn.Module
) -> None:
    monkeypatch.setitem(example.EPS, norm, eps)
    model, (x, y) = copy.deepcopy(trained).double(), load_dataset("digits", "").test.take(100).pixels()
    x = x.double()
    theirs = apgd(model, x, y, Threat(norm, eps), n_iter).x_best
    x_adv = example.apgd(model, x, y, norm, n_iter)
    different = (x_adv - theirs).abs().flatten(1).amax(1) > 1e-12
    # Long runs in L1 count entries that the projection made 0 or, by rounding, 1e-17: about one image in 200 goes another way.
    assert different.sum() <= (1 if norm == "L1" and n_iter > 40 else 0)
    assert Threat(norm, eps).contains(x.float(), example.apgd(trained, x.float(), y, norm, n_iter)).all()


def test_training_gives_the_same_weights(
    example: ModuleType, cifar: Path, float64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four epochs of three batches (16, 16 and 8 images), fed with train.py's batches and norms, from the same seed.

    In float64: APGD takes signs of gradients and the largest entries, so rounding of float32 would soon be another step.
    """
    flags = {"batch_size": 16, "epochs": 4, "at_iter": 3, "width": 2, "seed": 5, "l_eps": "1/32 10", "threads": 1}
    asked = [f"--{name}={value}" for name, value in flags.items()]
    draws_file = cifar / "draws.json"
    run(TRAIN, str(draws_file), "--attack=apgd", f"--data_dir={cifar}", f"--save_dir={cifar / 'runs'}", *asked)
    chances, drawn = zip(*json.loads(draws_file.read_text()), strict=True)
    (checkpoint,) = (cifar / "runs").glob("*/ep_4.pth")
    theirs = torch.load(checkpoint, weights_only=True)["state_dict"]

    train, counts = load_dataset("cifar10", str(cifar)).train, []
    epochs = [list(BatchLoader(train, 16, seed=5).epoch(epoch)) for epoch in range(4)]

    class Loader:
        """All epochs' batches, an epoch each time."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            self.epochs = iter(epochs)

        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(next(self.epochs))

    def sample_norm(wrong: Tensor, seen: Tensor) -> int:
        counts.append((wrong.clone(), seen.clone()))
        return int(drawn[len(counts) - 1])

    monkeypatch.setattr("torch.utils.data.DataLoader", Loader)
    monkeypatch.setattr(example, "sample_norm", sample_norm)
    monkeypatch.setattr(example, "N_ITER", 3)
    monkeypatch.setattr(example, "EPS", {"Linf": 1 / 32, "L1": 10.0})
    example.main([f"--data_dir={cifar}", "--epochs=4", "--width=2", "--seed=5", f"--save={cifar / 'eat.pth'}"])
    ours = torch.load(cifar / "eat.pth", weights_only=True)
    assert set(drawn) == {0, 1}
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-6)
    # train.py draws without waiting for the last batch, but for an epoch's first batch; the example always waits.
    for before, now, expected in zip(counts, counts[1:], chances[1:], strict=False):
        errors = [wrong / seen if seen.all() else torch.ones(2) for wrong, seen in (before, now)]
        assert any(expected == pytest.approx((error / error.sum()).tolist()) for error in errors)


def test_sample_norm(example: ModuleType) -> None:
    torch.manual_seed(0)

    def share(wrong: list[float], seen: list[float]) -> float:
        return sum(example.sample_norm(torch.tensor(wrong), torch.tensor(seen)) for _ in range(1000)) / 1000

    assert share([30.0, 60.0], [100.0, 300.0]) == pytest.approx(0.2 / 0.5, abs=0.05)
    for wrong, seen in (([0.0, 0.0], [0.0, 0.0]), ([9.0, 0.0], [10.0, 0.0]), ([0.0, 0.0], [10.0, 10.0])):
        assert share(wrong, seen) == pytest.approx(0.5, abs=0.05)


def test_the_command_line(cifar: Path) -> None:
    """Two tiny epochs as a user runs them, with the example's own order and crops: a line each, and a file of weights."""
    code = f"import runpy, sys; sys.argv[0] = 'minimal_eat.py'; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    flags = [f"--data_dir={cifar}", "--epochs=2", "--width=2", f"--save={cifar / 'eat.pth'}"]
    lines = run(code, *flags).splitlines()
    assert [line.split("  ")[0] for line in lines[-2:]] == ["epoch 1", "epoch 2"]
    weights = torch.load(cifar / "eat.pth", weights_only=True)
    assert weights["conv1.weight"].shape == (2, 3, 3, 3)
    assert all(value.isfinite().all() for value in weights.values())
