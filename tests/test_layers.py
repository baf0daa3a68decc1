"""Who may import whom: attacks, models and data know utils only; config names what they have; training uses all; no script is imported."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("attacks", "evaluation", "training", "models", "utils")
SCRIPTS = {"train", "eval", "plot"}
OURS = {*PACKAGES, *SCRIPTS, "data", "config", "tests", "benchmarks"}
ALLOWED = {
    "attacks": {"utils"},
    "evaluation": {"attacks", "utils"},
    "config": {"attacks", "models", "data", "utils"},
    "training": {"attacks", "evaluation", "models", "data", "config", "utils"},
    "models": {"utils"},
    "data": {"utils"},
    "plot": {"utils"},
    "utils": set(),
}
MODULES = sorted([*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))])


def our_imports(path: Path) -> set[str]:
    """Top-level names of ours that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names & OURS


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_layers(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    allowed = ALLOWED.get(layer, OURS)
    assert our_imports(path) <= {layer, *allowed} - {*SCRIPTS, "tests", "benchmarks"}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_packages(package: str) -> None:
    assert (ROOT / package / "__init__.py").is_file()
