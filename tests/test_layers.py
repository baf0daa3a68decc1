"""Who may import whom: attacks need torch alone; models and data know utils; config names what they have; training uses all."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("attacks", "evaluation", "training", "models", "plotting", "utils")
SCRIPTS = {"train", "eval", "plot"}
OURS = {*PACKAGES, *SCRIPTS, "data", "config", "tests", "benchmarks"}
ALLOWED = {
    "attacks": set(),
    "evaluation": {"attacks", "utils"},
    "config": {"attacks", "models", "data", "utils"},
    "training": {"attacks", "evaluation", "models", "data", "config", "utils"},
    "models": {"utils"},
    "data": {"utils"},
    "plotting": {"evaluation", "utils"},
    "plot": {"plotting", "utils"},
    "utils": set(),
}
MODULES = sorted([*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))])


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it; `.` for what is relative."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0] if node.level == 0 else ".")
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_layers(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    allowed = ALLOWED.get(layer, OURS)
    found = imports(path)
    assert found & OURS <= {layer, *allowed} - {*SCRIPTS, "tests", "benchmarks"}
    if layer == "attacks":  # a library: it works under any name
        assert found <= {".", "torch", *sys.stdlib_module_names}
    else:
        assert "." not in found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_packages(package: str) -> None:
    assert (ROOT / package / "__init__.py").is_file()
