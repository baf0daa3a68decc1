"""attacks/ as a library of its own: copied under another name or installed, in a place where nothing else of ours can be imported."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOORS = """
import importlib.util
import torch

assert not any(importlib.util.find_spec(name) for name in ("attacks", "utils", "evaluation", "training", "models"))
from NAME import AttackPlan, Threat, apgd, robust_accuracy

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 16), torch.nn.Softplus(), torch.nn.Linear(16, 5)).eval()
x = torch.rand(12, 3, 8, 8)
y = model(x).argmax(1)
result = apgd(model, x, y, Threat("L1", 12), n_iter=100)
assert bool(Threat("L1", 12).contains(x, result.x_adv).all()) and bool(result.broken.any())
threats = [Threat("Linf", 0.01), Threat("L2", 0.1), Threat("L1", 1.0)]
evaluation = robust_accuracy(model, x, y, threats, AttackPlan(n_iter=8))
print(evaluation)
for threat in threats:
    assert bool(threat.contains(x, evaluation.x_adv[threat]).all())
    assert torch.equal(model(evaluation.x_adv[threat]).argmax(1) == y, evaluation.robust(threat))
"""


def run(code: str, cwd: Path, path: Path) -> str:
    """What a script prints that can import from `path` (and torch) alone."""
    script = cwd / "script.py"
    script.write_text(code)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-P", "-W", "error", str(script)],
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def check_table(text: str) -> None:
    rows = [line.split()[0] for line in text.splitlines()[1:]]
    assert rows == ["clean", "Linf", "L2", "L1", "average", "union"]
    assert all(re.search(r"\d+\.\d\d %  \[ *\d+\.\d, *\d+\.\d\] +12$", line) for line in text.splitlines()[1:])


def package() -> str:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [(name, folder)] = settings["tool"]["setuptools"]["package-dir"].items()
    assert folder == "attacks"
    assert settings["tool"]["setuptools"]["packages"] == [name]
    assert settings["project"]["name"].replace("-", "_") == name
    return str(name)


def test_copied_under_another_name(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "attacks", tmp_path / "here" / "lp_attacks", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "empty").mkdir()
    check_table(run(DOORS.replace("NAME", "lp_attacks"), tmp_path / "empty", tmp_path / "here"))


def test_installed(tmp_path: Path) -> None:
    """From a copy, since pip builds in the sources' folder. Nothing else of the repository comes along."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(
        ROOT, source, ignore=lambda folder, names: [n for n in names if n.startswith(".") or n == "__pycache__"]
    )
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--no-index"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    name = package()
    assert {path.name for path in target.iterdir()} - {f"{name}-0.1.0.dist-info"} == {name}
    assert (target / name / "py.typed").exists()
    metadata = (target / f"{name}-0.1.0.dist-info" / "METADATA").read_text()
    assert re.findall(r"^Requires-Dist: (\w+)", metadata, re.MULTILINE) == ["torch"]
    (tmp_path / "empty").mkdir()
    check_table(run(DOORS.replace("NAME", name), tmp_path / "empty", target))


def test_the_docstring_shows_what_there_is() -> None:
    tree = ast.parse((ROOT / "attacks" / "__init__.py").read_text())
    docstring = ast.get_docstring(tree) or ""
    assert f"from {package()} import Threat, apgd" in docstring
    assert 'apgd(model, x, y, Threat("L1", 12), n_iter=100)' in docstring
    assert "robust_accuracy(model, x, y, threats)" in docstring
