"""The budgets of the code: short functions, few parameters, few branches (benchmarks/structure.py prints them)."""

from pathlib import Path

import pytest

from benchmarks import structure

ROOT = Path(__file__).parents[1]
MANY_PARAMETERS = {"attacks/apgd.py:apgd"}  # the door for other projects: each of its parameters stands for itself


@pytest.mark.parametrize("what", structure.LIMITS)
def test_functions_are_within_their_budgets(what: str) -> None:
    over = [f for f in structure.functions(ROOT) if getattr(f, what) > structure.LIMITS[what]]
    assert not [f for f in over if what != "parameters" or f.where not in MANY_PARAMETERS]


@pytest.mark.parametrize(("script", "lines"), [("train.py", 320), ("eval.py", 180)])
def test_scripts_are_short(script: str, lines: int) -> None:
    assert structure.lines_of([ROOT / script]) < lines


def test_it_counts_as_told(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("def f(self, a, b):\n    if a and b:\n        return [x for x in b]\n    return 1 if a else 2\n")
    node = structure.ast.parse(path.read_text()).body[0]
    assert structure.complexity(node) == 5
    assert structure.lines_around(path, [3]) == 4
