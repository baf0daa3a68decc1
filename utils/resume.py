"""Find, lock and check the run to resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from utils.checkpoint import UNSUPPORTED, load_tensors, newest_state, write_atomic
from utils.run_folder import parse_json, read_json, write_json
from utils.text import note_once

WAIT = 10.0  # seconds to wait for a lock: data workers of a killed process may outlive it and hold its lock for a while
REPRODUCED = ("commit", "packages", "device", "threads", "processes")  # with the same, weights are the same bit for bit


@dataclass(frozen=True)
class ResumePoint:
    """A run's folder and its newest undamaged training state (None: it ended before it had one, or after it was complete)."""

    folder: Path
    state: Path | None


def resume_point(folder: Path, stack: ExitStack) -> ResumePoint:
    """That of the run in `folder`, locked as long as `stack` is open. Raises ValueError, OSError.

    Deletes what is left of files that were being written, and damaged states, which are reported.
    """
    stack.enter_context(lock_run(folder, WAIT))
    for part in folder.glob("*.part"):
        part.unlink()
    state, damaged = newest_state(folder)
    content = load_tensors(state) if state else {}
    if state and (not isinstance(content, dict) or content.get("run") != run_id(folder)):
        raise ValueError(f"{state} is a state of another run: take it out of this folder")
    for path in damaged:
        print(f"{path} is damaged, it is not used")
        path.unlink()
    return ResumePoint(folder, state)


def run_id(folder: Path) -> Any:
    """What tells this run from all others, which env.json and each of its states hold; None if env.json has none."""
    path = folder / "env.json"
    return read_json(path).get("run") if path.exists() else None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a run. Raises ValueError or OSError."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not the folder of a run of train.py")
    return read_json(folder / "config.json")


def newest_run(save_dir: str, wanted: Callable[[dict[str, Any]], bool]) -> Path | None:
    """The newest run in save_dir whose config.json is wanted; None if there is none."""
    runs = sorted(Path(save_dir).glob("*/config.json"), key=lambda path: (path.stat().st_mtime_ns, str(path)))
    for config in reversed(runs):
        try:
            if wanted(read_json(config)):
                return config.parent
        except (ValueError, OSError, TypeError, KeyError):  # by another version of this program
            continue
    return None


def lock_run(folder: Path, seconds: float) -> AbstractContextManager[Any]:
    """Lock a run's folder; the lock ends with this process in any case. Raises ValueError if another process holds it for `seconds`.

    On a file system without locks it prints a note, and holds nothing.
    """
    lock = FileLock(folder / ".lock", fallback_to_soft=False)
    try:
        lock.acquire(timeout=seconds)
    except Timeout as error:
        raise ValueError(f"{folder} belongs to a process that still runs") from error
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in UNSUPPORTED:
            raise
        note_once(f"this file system has no locks: see to it that no second process uses {folder}")
        return nullcontext()
    return lock


def check_same(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raises ValueError unless config.json records the same facts about what was loaded."""
    before = read_json(folder / "config.json")
    different = [name for name in facts if before.get(name) != json.loads(json.dumps(facts[name]))]
    if different:
        raise ValueError(f"{folder} was started with another {', '.join(different)}: leave it as it was")


def cut_metrics(path: Path, epochs: int) -> None:
    """Keep the lines of the first `epochs` epochs of metrics.jsonl: later epochs are trained again."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                if parse_json(line)["epoch"] <= epochs:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # cut off by the end of a run
                continue
        write_atomic("".join(f"{line}\n" for line in kept).encode(), path)


def note_resumed(folder: Path, environment: dict[str, Any]) -> list[str]:
    """Append this environment to env.json; names of its entries that differ from the first one's and may change weights by rounding."""
    content = read_json(folder / "env.json")
    if not isinstance(earlier := content.get("resumed", []), list):
        raise ValueError(f"{folder / 'env.json'}: what it says of earlier resumptions is no list")
    write_json(folder / "env.json", content | {"resumed": [*earlier, environment]})
    return [name for name in REPRODUCED if content.get(name) != environment[name]]
