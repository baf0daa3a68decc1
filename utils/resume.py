"""Which run a command goes on with, and that no other process does."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Collection, Sequence
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from utils.checkpoint import write_atomic
from utils.cli import Parser
from utils.run_folder import read_json, write_json
from utils.state import newest_state

ANY_RUN = ""  # what --resume alone stands for: the newest run of this command
WAIT = 10.0  # seconds: processes that read data may outlive the one that was killed so long, and keep its lock
CODE = re.compile(r".+\.py:\w+(@.+)?")  # a network that is made by a file of Python


def with_saved_command(parser: Parser, argv: Sequence[str]) -> Namespace:
    """The flags of `argv`, for --resume=RUN behind those that RUN was started with. Usage errors for a RUN that is none.

    A file of Python that RUN's files name is not run unless argv names it too.
    """
    args = parser.parse_args(argv)
    if not args.resume:
        return args
    with parser.blame("--resume"):
        saved = parser.parse_args([*command_of(Path(args.resume)), *argv])
        if CODE.fullmatch(saved.model_name or "") and saved.model_name != args.model_name:
            raise ValueError(f"its network is made by code, name that again: --model_name='{saved.model_name}'")
    return saved


def command_of(folder: Path) -> list[str]:
    """The flags that a run was started with. Raises ValueError or OSError."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not the folder of a run of train.py")
    command = read_json(folder / "env.json").get("command")
    if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
        raise ValueError(f"{folder / 'env.json'} does not say how the run was started")
    return command[1:]


@dataclass(frozen=True)
class ResumePoint:
    """A run to go on with: its folder, and its newest whole state (None: it ended before it had one, or after it was complete)."""

    folder: Path
    state: Path | None


def run_before(parser: Parser, args: Namespace, free: Collection[str], held: ExitStack) -> ResumePoint | None:
    """The run that args.resume means, claimed for as long as `held` is; None if there is none. Raises ValueError or OSError.

    args: as given, defaults not filled in. What is left of files that were being written is deleted.
    """
    if args.resume is None:
        return None
    folder = newest_run(parser, args, free) if args.resume == ANY_RUN else Path(args.resume)
    if folder is None:
        print(f"--resume: there is no run of this command in {args.save_dir} yet, this is a new one")
        return None
    held.enter_context(lock_run(folder, WAIT))
    for part in folder.glob("*.part"):
        part.unlink()
    state, damaged = newest_state(folder)
    for path in damaged:
        print(f"{path} is damaged, it is not used")
        path.unlink()
    return ResumePoint(folder, state)


def newest_run(parser: Parser, args: Namespace, free: Collection[str]) -> Path | None:
    """The newest run in --save_dir whose command asked for the same as args in all flags but the free ones; None if there is none."""
    asked = {name: value for name, value in vars(args).items() if name not in free}
    runs = sorted(Path(args.save_dir).glob("*/config.json"), key=lambda path: (path.stat().st_mtime_ns, str(path)))
    for config in reversed(runs):
        try:
            with redirect_stderr(StringIO()):
                theirs = vars(parser.parse_args(command_of(config.parent)))
        except (ValueError, OSError, SystemExit):  # by another version of this program
            continue
        if {name: value for name, value in theirs.items() if name not in free} == asked:
            return config.parent
    return None


def lock_run(folder: Path, seconds: float) -> FileLock:
    """The lock of a run's folder, which ends with this process however that ends. Raises ValueError if another keeps it so long."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=seconds)
    except Timeout as error:
        raise ValueError(f"{folder} belongs to a process that still runs") from error
    return lock


def check_same(folder: Path, resolved: dict[str, Any], free: Collection[str]) -> None:
    """Raises ValueError unless the run in `folder` was started with the same settings, defaults included, but for the free ones."""
    config = read_json(folder / "config.json")
    now = json.loads(json.dumps(resolved))
    different = [name for name in now if name not in free and config.get(name) != now[name]]
    if different:
        raise ValueError(f"{folder} was started with another {', '.join(different)}: leave it as it was")


def cut_metrics(path: Path, epochs: int) -> None:
    """Keep the lines of the first so many epochs: what comes after is done again."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["epoch"] <= epochs:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # cut off by the end of a run
                continue
        write_atomic("".join(f"{line}\n" for line in kept).encode(), path)


def note_resumed(folder: Path, environment: dict[str, Any]) -> list[str]:
    """Add this process to the run's env.json; in what it differs from the first one, so that weights may differ in their last bits."""
    content = read_json(folder / "env.json")
    write_json(folder / "env.json", content | {"resumed": [*content.get("resumed", []), environment]})
    names = ("commit", "packages", "device", "threads", "processes")
    return [name for name in names if content.get(name) != environment[name]]
