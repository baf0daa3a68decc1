"""Size of the code: lines per room, longest functions, functions with many parameters, complexity, and the files one batch visits.

python benchmarks/structure.py [FOLDER]     FOLDER: another checkout of this repository (this one)
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = ("tests", "benchmarks")
LIMITS = {"lines": 50, "parameters": 6, "complexity": 12}
BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.With, ast.IfExp, ast.comprehension, ast.match_case)
TRACE = """
import sys, runpy
from pathlib import Path
root, seen = Path(sys.argv[1]).resolve(), set()
sys.argv = ["train.py", *sys.argv[2:]]
sys.path.insert(0, str(root))
import train
def profile(frame, event, arg):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(str(root)) and ".venv" not in code.co_filename:
        seen.add((code.co_filename, code.co_firstlineno))
close = getattr(train, "finish_epoch", None) or train.close_epoch
def traced(function):
    def call(*args):
        sys.setprofile(profile)
        try:
            return function(*args)
        finally:
            sys.setprofile(None)
    return call
train.train_epoch = traced(train.train_epoch)
setattr(train, close.__name__, traced(close))
train.main()
print("VISITED", *sorted(f"{Path(file).relative_to(root)}:{line}" for file, line in seen))
"""


@dataclass(frozen=True)
class Function:
    """A function or method, and how large it is."""

    where: str
    lines: int
    parameters: int
    complexity: int


def sources(root: Path) -> list[Path]:
    """The Python files that git tracks, without tests and benchmarks."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=root, capture_output=True, text=True, check=True).stdout
    paths = [root / line for line in listed.split()]
    return [path for path in paths if path.exists() and path.relative_to(root).parts[0] not in LEFT_OUT]


def functions(root: Path) -> Iterator[Function]:
    """All functions of the sources; lines without decorators, parameters without self and cls."""
    for path in sources(root):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                names = [arg.arg for arg in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
                parameters = len([name for name in names if name not in ("self", "cls")])
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                yield Function(f"{path.relative_to(root)}:{node.name}", lines, parameters, complexity(node))


def complexity(node: ast.AST) -> int:
    """Cyclomatic complexity: 1 and the branches, `and` and `or` included."""
    inside = list(ast.walk(node))
    operators = sum(len(each.values) - 1 for each in inside if isinstance(each, ast.BoolOp))
    return 1 + sum(isinstance(each, BRANCHES) and not isinstance(each, ast.With) for each in inside) + operators


def visited(root: Path) -> dict[str, int]:
    """The files whose functions run between the first batch of a digits run of E-AT and its checkpoint; lines of these functions."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--dataset=digits", "--width=4", "--n_ex_train=16", "--batch_size=16", "--epochs=1", "--device=cpu"]
        flags += ["--attack=apgd", "--at_iter=2", f"--save_dir={folder}"]
        command = [sys.executable, "-c", TRACE, str(root), *flags]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env=dict(os.environ))
    [line] = [line for line in run.stdout.splitlines() if line.startswith("VISITED")]
    places: dict[str, list[int]] = {}
    for place in line.split()[1:]:
        file, _, number = place.rpartition(":")
        places.setdefault(file, []).append(int(number))
    return {file: lines_around(root / file, numbers) for file, numbers in places.items()}


def lines_around(path: Path, numbers: list[int]) -> int:
    """How many lines the functions have in which these lines are."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            begin = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            inside = range(begin, (node.end_lineno or node.lineno) + 1)
            found |= set(inside) if any(number in inside for number in numbers) else set()
    return len(found)


def lines_of(paths: list[Path]) -> int:
    """Lines of these files together."""
    return sum(len(path.read_text().splitlines()) for path in paths)


def main() -> None:
    """Print the tables."""
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    rooms: dict[str, list[Path]] = {}
    for path in sources(root):
        rooms.setdefault(path.relative_to(root).parts[0], []).append(path)
    for room, paths in sorted(rooms.items()):
        print(f"{room:<16}{lines_of(paths):6d} lines  {len(paths):3d} files")
    print(f"{'together':<16}{lines_of(sources(root)):6d} lines  {len(sources(root)):3d} files")
    found = list(functions(root))
    for name, limit in LIMITS.items():
        over = sorted((f for f in found if getattr(f, name) > limit), key=lambda f: -getattr(f, name))
        largest = max(getattr(f, name) for f in found)
        print(f"functions with more than {limit} {name}: {len(over)}, the most {largest}")
        for function in over:
            print(f"    {getattr(function, name):4d}  {function.where}")
    files = sorted(visited(root).items(), key=lambda item: -item[1])
    total, reached, needed = sum(lines for _, lines in files), 0, 0
    while reached < 0.8 * total:
        reached, needed = reached + files[needed][1], needed + 1
    whole = lines_of([root / file for file, _ in files])
    print(f"one batch visits {len(files)} files of {whole} lines; the functions that it runs have {total},")
    print(f"four fifths of them in {needed} files: {' '.join(f'{file} {lines}' for file, lines in files)}")


if __name__ == "__main__":
    main()
