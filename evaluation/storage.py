"""What an evaluation has finished so far, kept so that it can go on after any end: lines of JSON, and images beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attacks.evaluator import EvaluationCallback, Examples, Progress
from attacks.results import AttackLog, FinishedRun
from attacks.threat import Threat
from utils.distributed import barrier


class Journal:
    """Records appended to folder/progress-RANK.jsonl, one file a process; without a folder in memory alone.

    A record counts once it is on the disk. A line that an abrupt end cut off is left out when the files are read.
    """

    def __init__(self, folder: Path | None, rank: int = 0) -> None:
        self.folder = folder
        self.path = folder / f"progress-{rank}.jsonl" if folder else None
        self.memory: list[dict[str, Any]] = []
        if self.path and self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a") as file:
                file.write("\n")  # a torn line stays alone on its line

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Append the records and wait until they are on the disk."""
        if not self.path:
            self.memory += records
        elif records:
            with self.path.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())

    def add_clean(self, index: Tensor, right: Tensor) -> None:
        """Which of the examples `index` (B,) are right without an attack, right (B,) bool; those known already are left out."""
        known = {record["point"] for record in self.records() if record["task"] == "clean"}
        pairs = zip(index.tolist(), right.tolist(), strict=True)
        self.add([{"task": "clean", "point": i, "right": r} for i, r in pairs if i not in known])

    def add_runs(self, threat: Threat, finished: Sequence[FinishedRun]) -> None:
        """Runs that are over."""
        self.add(
            [
                {"task": str(threat), "point": r.example, "run": r.run, "passes": r.passes, "broken": r.broken}
                for r in finished
            ]
        )

    def records(self) -> Iterator[dict[str, Any]]:
        """All records of all processes."""
        if not self.folder:
            yield from self.memory
            return
        for path in sorted(self.folder.glob("progress-*.jsonl")):
            with path.open() as file:
                for line in file:
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError:
                        continue

    def replay(self, n: int, logs: Mapping[Threat, AttackLog]) -> Tensor:
        """Fill the logs with all that is known of n examples; which are right without an attack, (n,) bool."""
        clean = torch.zeros(n, dtype=torch.bool)
        by_name = {str(threat): log for threat, log in logs.items()}
        for record in self.records():
            if record["task"] == "clean":
                clean[record["point"]] = record["right"]
            elif record["task"] in by_name:
                finished = FinishedRun(record["point"], record["run"], record["passes"], record["broken"])
                by_name[record["task"]].add([finished])
        return clean


class ImageFile:
    """Float32 images (N, C, H, W) in a .npy file that is written in place and never read into memory as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images: np.memmap[Any, Any] = np.lib.format.open_memmap(path, mode="r+")

    @staticmethod
    def make(path: Path, n: int, images: Callable[[Tensor], Tensor], chunk: int = 1000) -> None:
        """Write `images(index)` for all n examples, if there is no such file yet: whole or not at all."""
        if path.exists():
            return
        part = path.with_name(path.name + ".part")
        shape = (n, *images(torch.arange(1)).shape[1:])
        file = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
        for index in torch.arange(n).split(chunk):
            file[index.numpy()] = images(index).numpy()
        file.flush()
        part.replace(path)

    def write(self, index: Sequence[int], images: Tensor) -> None:
        """Put images (B, C, H, W) at the places `index`, on the disk when it returns."""
        self.images[list(index)] = images.numpy()
        self.images.flush()


def image_path(folder: Path, threat: Threat) -> Path:
    """Where an evaluation keeps the images of a threat model."""
    return folder / f"adv_{str(threat).replace(' ', '_')}.npy"


def open_images(
    folder: Path | None, threats: Sequence[Threat], examples: Examples, rank: int
) -> dict[Threat, ImageFile]:
    """The image file of each threat model, which the first process makes if it is missing; none without a folder."""
    if folder and rank == 0:
        for threat in threats:
            ImageFile.make(image_path(folder, threat), len(examples), examples.x)
    barrier()
    return {threat: ImageFile(image_path(folder, threat)) for threat in threats} if folder else {}


class Recorder(EvaluationCallback):
    """Stores what an evaluation finds, an image before the run that made it, and shows a bar."""

    def __init__(self, journal: Journal, images: Mapping[Threat, ImageFile], show: bool) -> None:
        self.journal, self.images, self.show = journal, images, show
        self.bar: tqdm[Any] | None = None

    def broken(self, threat: Threat, examples: Sequence[int], x_adv: Tensor) -> None:
        if threat in self.images:
            self.images[threat].write(examples, x_adv)

    def runs_finished(self, threat: Threat, finished: Sequence[FinishedRun]) -> None:
        self.journal.add_runs(threat, finished)

    def progress(self, progress: Progress) -> None:
        if not self.show:
            return
        if self.bar is None:
            self.bar = tqdm(total=progress.total, initial=progress.done, unit="run", leave=False)
        self.bar.set_description(f"{progress.threat}, {progress.run}".rstrip(", "), refresh=False)
        self.bar.set_postfix_str(f"{progress.unbroken} examples not yet broken", refresh=False)
        self.bar.update(progress.done - self.bar.n)
        if progress.done == progress.total:
            self.bar.close()
            self.bar = None
