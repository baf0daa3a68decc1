"""Folders of runs and results: names, JSON files, the environment of a process."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import torch

from utils.checkpoint import write_atomic

PACKAGES = ("torch", "torchvision", "numpy", "robustbench", "gdown", "scikit-learn", "tqdm", "filelock")


def new_folder(parent: str, parts: list[str]) -> Path:
    """Make parent/NAME, or with -2, -3, ... behind it if there is one. Raises OSError, and then leaves no new folder."""
    name = folder_name(parts)
    missing = [path for path in (Path(parent), *Path(parent).parents) if not path.exists()]
    try:
        Path(parent).mkdir(parents=True, exist_ok=True)
    except OSError:
        for path in missing:
            with suppress(OSError):  # not made, or another process uses it by now
                path.rmdir()
        raise
    for number in count(1):
        folder = Path(parent) / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError


def newest_folder(parent: str, parts: list[str]) -> Path | None:
    """The folder that new_folder made last with these arguments; None if there is none."""
    newest, name = None, folder_name(parts)
    for number in count(1):
        folder = Path(parent) / (name if number == 1 else f"{name}-{number}")
        if not folder.is_dir():
            return newest
        newest = folder
    raise AssertionError


def folder_name(parts: list[str]) -> str:
    """The non-empty parts in portable letters."""
    return "_".join(re.sub(r"[^A-Za-z0-9._+-]+", "-", part).strip("-.") for part in parts if part)[:180]


@contextmanager
def new_folder_or_nothing(folder: Path) -> Iterator[Path]:
    """`folder`, made if it is missing; an exception inside takes away again all that was made, outer folders too."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except BaseException:
        if missing:
            shutil.rmtree(missing[-1], ignore_errors=True)
        raise


def environment(device: torch.device, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command (argv: its flags, if not those of this process), commit, versions, device and time: what it takes to run the same again."""
    return {
        "command": [Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)],
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.processor()}".strip(),
        "threads": torch.get_num_threads(),
    }


def write_json(path: Path, content: Any) -> None:
    """JSON with a line for each value, lists of numbers on one line; whole or not at all."""
    text = re.sub(r"\[[^\[\]{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), json.dumps(content, indent=2))
    write_atomic(f"{text}\n".encode(), path)


LONGEST_NUMBER, DEEPEST = 30, 100  # digits, levels; of what these programs write


def parse_json(text: str) -> Any:
    """What a text of JSON holds. Raises ValueError, also for whole numbers and nesting beyond all that is written here."""
    try:
        content = json.loads(text, parse_int=_whole_number)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    level, depth = [content], 0
    while level:
        if depth > DEEPEST:
            raise ValueError("it is nested too deep")
        depth += 1
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [each for values in inner for each in values]
    return content


def _whole_number(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"it has a number of {len(digits)} digits")
    return int(digits)


def read_json(path: str | Path) -> dict[str, Any]:
    """An object from a file of JSON. Raises ValueError or OSError."""
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a JSON file") from error
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"{path} is not a JSON file that can be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """One more object, on a line of its own, even if what was written last was cut off."""
    with path.open("ab+") as file:
        file.seek(max(file.tell() - 1, 0))
        torn = file.read() not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of `append_json_line`, without lines that are none, such as one cut off by the end of a run."""
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            if isinstance(record := parse_json(line), dict):
                yield record


def flat(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested dictionaries, by their keys with / between."""
    numbers: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            numbers[f"{prefix}{key}"] = value
    return numbers


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (" with changes" if changed else "")
