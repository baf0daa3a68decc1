"""README and docs: every command parses, the Python in them runs, links lead somewhere, README stays short."""

from __future__ import annotations

import multiprocessing
import re
import runpy
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from config import EvalConfig, TrainConfig, checked_eval, flags_given, make_parser, resolved

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
README, EXTENDING = ROOT / "README.md", ROOT / "docs" / "extending.md"
SCRIPT = re.compile(r"(?:^|\s)(?:python|torchrun .*?|--rdzv\S+) ((?:\w+/)*\w+\.py)(?=\s|$)")


@dataclass(frozen=True)
class Command:
    """A line of a page that runs a script."""

    page: str
    script: str
    flags: tuple[str, ...]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[Command]:
    """The commands of a page's `sh` blocks and of its inline code."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += [code for code in re.findall(r"`(python [^`\n]+)`", page.read_text()) if "..." not in code]
    found = []
    for line in lines:
        match = SCRIPT.search(line)
        if match and "--help" not in line:
            found.append(Command(page.name, match[1], tuple(shlex.split(line[match.end() :], comments=True))))
    return found


COMMANDS = sorted({command for page in PAGES for command in commands(page)}, key=str)
OWN = [block for page in (README, EXTENDING) for block in blocks(page, "python")]
RUN = [command for command in commands(EXTENDING) if "RUN" not in str(command.flags)]


@pytest.fixture
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages' blocks of Python are, and those that commands name."""
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(OWN):
        named = re.match(r"# (\w+\.py)\n", block)
        (tmp_path / (named[1] if named else f"block{number}.py")).write_text(block)
    return tmp_path


def test_the_pages_have_commands() -> None:
    assert {command.page for command in COMMANDS} >= {
        "README.md",
        "training.md",
        "evaluation.md",
        "clusters.md",
        "log.md",
    }
    assert len(COMMANDS) > 40
    assert len(OWN) == 7
    assert len(RUN) == 7


@pytest.mark.parametrize(
    "command", COMMANDS, ids=lambda command: f"{command.page}: {command.script} {shlex.join(command.flags)}"
)
def test_every_command_parses(command: Command, own_files: Path) -> None:
    if command.script == "eval.py":
        checked_eval(EvalConfig(**flags_given(make_parser(EvalConfig, None), command.flags)))
    elif command.script == "train.py":
        asked = flags_given(make_parser(TrainConfig, None), command.flags)
        assert resolved(TrainConfig(**asked)).epochs
    else:
        assert (ROOT / command.script).is_file() or (own_files / command.script).is_file()


def run(script: Path, flags: tuple[str, ...]) -> str:
    """Run a script as `python script FLAGS` in the current folder, with the repository's modules; what it says. Fails if it fails."""
    said = Path("said.txt")
    begin = Path("begin.py").absolute()
    begin.write_text(f"""
import os, runpy, sys
os.chdir({str(Path.cwd())!r})
for stream in (1, 2):
    os.dup2(os.open({str(said)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
sys.path.insert(0, {str(ROOT)!r})
sys.argv = {[script.name, *flags]!r}
runpy.run_path({str(script)!r}, run_name="__main__")
""")
    process = multiprocessing.get_context("forkserver").Process(target=runpy.run_path, args=(str(begin),))
    process.start()
    process.join()
    text = said.read_text()
    assert process.exitcode == 0, text
    return text


@pytest.mark.parametrize("command", RUN, ids=lambda command: f"{command.script} {command.flags[0]}")
def test_examples_of_extending_run(command: Command, own_files: Path) -> None:
    own = own_files / command.script
    said = run(own if own.is_file() else ROOT / command.script, (*command.flags, "--device=cpu", "--threads=1"))
    if command.script == "eval.py":
        assert "clean" in said
        return
    [checkpoint] = (own_files / "runs").glob("*/ep_1.pth")
    assert f"saved {checkpoint.relative_to(own_files)}" in said


def test_python_of_readme_runs(own_files: Path) -> None:
    [_] = blocks(README, "python")
    said = run(own_files / "block0.py", ())
    assert all(row in said for row in ("clean", "Linf", "L2", "L1", "average", "union"))


def test_readme_is_short() -> None:
    text = README.read_text()
    assert len(text.split()) < 1000
    assert [line for line in text.splitlines() if len(line) > 120] == []
    assert "![" in "".join(text.splitlines(keepends=True)[:15]), "a picture on the first screen"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, target


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.png")), ids=lambda path: path.name)
def test_every_picture_is_shown(path: Path) -> None:
    assert any(path.name in page.read_text() for page in PAGES)
