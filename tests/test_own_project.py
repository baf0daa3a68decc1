"""A file of one's own is imported as Python imports a script, and networks of all kinds work, or one line says why not."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

import eval as eval_script
import train
from models import build_model
from models.own_project import OURS

FLAGS = ["--dataset=digits", "--device=cpu"]
QUICK = [*FLAGS, "--n_ex=40", "--attacks=fast", "--n_iter=4", "--l_norms=Linf", "--l_eps=0.1"]
TRAIN = [*FLAGS, "--attack=apgd", "--l_norms=Linf L1", "--at_iter=2", "--n_ex_train=64", "--epochs=1"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield  # type: ignore[misc]
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def write(files: dict[str, str]) -> None:
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)


NET = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)

    def forward(self, x):
        return self.layer(x.flatten(1))
"""

PROJECTS: dict[str, dict[str, str]] = {
    "a sibling": {"p/helpers.py": NET, "p/nets.py": "from helpers import Net as make\n"},
    "packages named as ours": {
        "p/models/__init__.py": "",
        "p/models/small.py": NET,
        "p/utils.py": "from models.small import Net\n",
        "p/data/__init__.py": "from utils import Net\n",
        "p/attacks/__init__.py": "",
        "p/attacks/apgd.py": "from data import Net\n",
        "p/nets.py": "from attacks.apgd import Net\nimport config_of_mine\n\n\ndef make():\n    return Net()\n",
        "p/config_of_mine.py": "import models\n\nassert not hasattr(models, 'build_model')\n",
    },
    "imports inside functions": {
        "p/utils/__init__.py": "",
        "p/utils/late.py": "def scale():\n    return 2.0\n",
        "p/nets.py": NET.replace("return self", "from utils.late import scale\n        return scale() * self")
        + "\n\ndef make():\n    import utils.late\n    return Net()\n",
    },
    "a package's file": {
        "p/__init__.py": "",
        "p/layers.py": NET,
        "p/nets.py": "from .layers import Net\n\n\ndef make():\n    return Net()\n",
    },
    "dataclasses": {
        "p/nets.py": "from __future__ import annotations\nfrom dataclasses import dataclass, field\n"
        + NET
        + "\n\n@dataclass\nclass Sizes:\n    n: int = 1\n    more: list[int] = field(default_factory=list)\n"
        "\n\ndef make():\n    Sizes()\n    return Net()\n"
    },
    "a guard": {"p/nets.py": NET + "\n\nmake = Net\nif __name__ == '__main__':\n    raise SystemExit('trains')\n"},
    "ours too": {"p/nets.py": "from models import build_model\n\n\ndef make():\n"
                 "    return build_model('preact-resnet18', in_channels=1, width=4)\n"},
    "the name of a library": {"p/random.py": NET + "\n\nmake = Net\n"},
    "a folder of images named data": {"p/data/x.png": "", "p/nets.py": NET + "\n\nmake = Net\n"},
}  # fmt: skip


@pytest.mark.parametrize("kind", PROJECTS)
def test_it_is_imported_as_python_does(kind: str) -> None:
    write(PROJECTS[kind])
    file = "p/random.py" if "library" in kind else "p/nets.py"
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in OURS}
    model = build_model(f"{file}:make", num_classes=10, in_channels=1)
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(copy.deepcopy(model).eval()(x), model.eval()(x))
    assert {name: sys.modules.get(name) for name in ours} == ours  # also after a forward pass
    assert train.main([*TRAIN, f"--arch={file}:make"])
    assert eval_script.main([*QUICK, f"--model_name={file}:make"])


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"nets.py": "import helpers\n", "helpers.py": "x = 1\n\nx.y\n"}, "helpers.py, line 3: AttributeError"),
        ({"nets.py": "import helpers\n", "helpers.py": "def f(:\n"}, "helpers.py, line 1: SyntaxError"),
        ({"nets.py": "\nimport not_there\n"}, "nets.py, line 2: ModuleNotFoundError"),
        ({"nets.py": "import json\n\njson.loads('{')\n"}, "nets.py, line 3: JSONDecodeError"),
        (
            {"nets.py": "def make():\n    import torch\n    return torch.nn.Linear('a', 2)\n"},
            "nets.py, line 3: TypeError",
        ),
    ],
)
def test_an_error_shows_ones_own_line(files: dict[str, str], words: str) -> None:
    write(files)
    with pytest.raises(ValueError, match=words):
        build_model("nets.py:make", num_classes=10)


KINDS = """
import torch
from torch import nn


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        return self.layer(x.flatten(1))


class InPlace(Base):
    def forward(self, x):
        return self.layer(x.mul_(2).sub_(1).relu_().flatten(1))


class TupleInTraining(Base):
    def forward(self, x):
        out = super().forward(x)
        return (out, out) if self.training else out


class WithoutParameters(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10]


class WithoutGradient(Base):
    def forward(self, x):
        return super().forward(x).detach()


class RaisesOften(Base):
    def forward(self, x):
        if len(x) > 3:
            raise KeyError("too many")
        return super().forward(x)


class FewerRows(Base):
    def forward(self, x):
        return super().forward(x)[: max(1, len(x) - 1)]


class DictOut(Base):
    def forward(self, x):
        return {"logits": super().forward(x)}


class Unhashable(Base):
    def forward(self, x):
        return super().forward(x).to(torch.complex64)


def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
"""

# For training and for an evaluation what stands in the one line, or None where it works.
NETWORKS: dict[str, tuple[str | None, str | None]] = {
    "InPlace": (None, None),
    "TupleInTraining": ("in train mode", None),
    "WithoutParameters": ("no parameters", None),
    "WithoutGradient": ("through autograd", None),
    "RaisesOften": ("too many", "too many"),
    "FewerRows": ("logits", "logits"),
    "DictOut": ("dict", "dict"),
    "Unhashable": ("complex", "complex"),
    "lazy": ("lazy layers", "lazy layers"),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_of_all_kinds_work_or_one_line_says_why_not(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("nets.py").write_text(KINDS)
    calls = (
        (train.main, [*TRAIN, f"--arch=nets.py:{kind}"]),
        (eval_script.main, [*QUICK, f"--model_name=nets.py:{kind}"]),
    )
    for (main, flags), words in zip(calls, NETWORKS[kind], strict=True):
        capsys.readouterr()
        if words is None:
            assert main(flags)
            continue
        with pytest.raises(SystemExit) as stop:
            main(flags)
        error = str(stop.value.code) if isinstance(stop.value.code, str) else capsys.readouterr().err
        assert words in error
        assert error.strip().count("\n") == 0
    if kind == "WithoutGradient":
        content = json.loads(next(Path("results").rglob("eval.json")).read_text())
        assert any("no gradient" in warning for warning in content["warnings"])
