"""Run folders of train.py and result folders of eval.py, as plot.py reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.pictures import as_text
from utils.run_folder import parse_json, read_json

RESULTS = ("eval.json", "eval_ema.json")


@dataclass(frozen=True)
class Run:
    """What a folder holds; without records it is a result of eval.py."""

    label: str
    records: list[dict[str, Any]]  # an epoch each
    files: dict[str, dict[str, Any]]  # content of config.json and RESULTS, where there
    group: str  # the label that those have which differ in their seed alone
    seed: int | None  # of training, where the name says it


SEED = re.compile(r"_?seed(\d+)")  # in the name of a run, and of its evaluations


def read_runs(folders: Sequence[Path], labels: Sequence[str] | None = None) -> list[Run]:
    """A run for each folder. Those of one label are a group; without labels, those whose names differ in the seed alone.

    Raises ValueError or OSError for what `read_run` refuses, and for another number of labels.
    """
    without_seed = [Path(SEED.sub("", folder.resolve().name)) for folder in folders]
    names = dict(zip(dict.fromkeys(without_seed), short_labels([*dict.fromkeys(without_seed)]), strict=True))
    groups = labels or [names[name] for name in without_seed]
    return [read_run(*each) for each in zip(folders, labels or short_labels(folders), groups, strict=True)]


def read_run(folder: Path, label: str, group: str | None = None) -> Run:
    """Raises ValueError or OSError if it is no folder, has nothing to draw or holds a damaged file."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    paths = [folder / name for name in ("config.json", *RESULTS)]
    files = {path.name: read_json(path) for path in paths if path.exists()}
    metrics = folder / "metrics.jsonl"
    records = read_records(metrics) if metrics.exists() else []
    if not records and "eval.json" not in files:
        raise ValueError(f"{folder} has neither eval.json nor a metrics.jsonl with a finished epoch")
    seed = SEED.search(folder.resolve().name)
    return Run(as_text(label), records, files, as_text(group or label), int(seed[1][:9]) if seed else None)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The epochs of a metrics.jsonl, but for a torn last line: the run is writing it. Raises ValueError."""
    records: list[dict[str, Any]] = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON") from error
        if not isinstance(record, dict) or type(record.get("epoch")) is not int:
            raise ValueError(f"{path}, line {number} is no epoch of train.py")
        records.append(record)
    return records


def short_labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names; of several, without the _-separated words that all share, if they still differ then.

    What is left of one may be nothing: it is `default`, as names tell what is not.
    """
    names = [folder.resolve().name for folder in folders]
    if len(names) == 1:
        return names
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    shared = set.intersection(*(set(name.split("_")) for name in names))
    short = ["_".join(word for word in name.split("_") if word not in shared) or "default" for name in names]
    return short if len(set(short)) == len(short) else names


def series(run: Run, *path: str) -> dict[int, Any]:
    """What the records have there, by epoch, without what is null or missing."""
    found = {}
    for record in run.records:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found[record["epoch"]] = value
    return found
