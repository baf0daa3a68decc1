"""What an evaluation has finished so far, kept so that it can go on after any end: lines of JSON, and images beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attacks.results import AttackLog, Attempt
from attacks.standard import EvaluationCallback, Examples
from attacks.threat import Threat
from utils.distributed import barrier


class Store(EvaluationCallback):
    """Keeps what an evaluation finds in its folder, an image before the run that made it, and shows a bar; without a folder the bar alone.

    Process RANK appends to progress-RANK.jsonl. A record counts once it is on the disk; a line that an abrupt end cut off is left out
    when the files are read. The images are in adv_THREAT.npy, float32 (N, C, H, W), clean where none broke the example; these files are
    written in place and never read into memory as a whole.
    """

    def __init__(
        self, folder: Path | None, rank: int, threats: Sequence[Threat], examples: Examples, bar: bool
    ) -> None:
        self.folder, self.show = folder, bar
        self.path = folder / f"progress-{rank}.jsonl" if folder else None
        self.bar: tqdm[Any] | None = None
        self.images: dict[Threat, np.memmap[Any, Any]] = {}
        if self.path and self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a") as file:
                file.write("\n")  # a torn line stays alone on its line
        if folder:
            for threat in threats if rank == 0 else ():
                _make_images(image_path(folder, threat), examples)
            barrier()
            self.images = {t: np.lib.format.open_memmap(image_path(folder, t), mode="r+") for t in threats}

    def broken(self, threat: Threat, examples: Sequence[int], x_adv: Tensor) -> None:
        if threat in self.images:
            self.images[threat][list(examples)] = x_adv.numpy()
            self.images[threat].flush()

    def runs_finished(self, threat: Threat, finished: Sequence[Attempt]) -> None:
        about = {"task": str(threat)}
        self._append(
            [about | {"point": r.example, "run": r.run, "passes": r.passes, "broken": r.broken} for r in finished]
        )

    def progress(self, threat: Threat, done: int, total: int, status: str) -> None:
        if not self.show:
            return
        # disable=None: no bar where stderr is no terminal
        self.bar = self.bar or tqdm(total=total, initial=done, unit="run", leave=False, disable=None)
        self.bar.set_description(f"{threat}, {status}", refresh=False)
        self.bar.update(done - self.bar.n)
        if done == total:
            self.bar.close()
            self.bar = None

    def add_clean(self, index: Tensor, clean: Tensor) -> None:
        """Which of the examples `index` (B,) are right without an attack, of clean (N,) bool; those known already are left out."""
        known = {record["point"] for record in self._records() if record["task"] == "clean"}
        new = [i for i in index.tolist() if i not in known]
        self._append([{"task": "clean", "point": i, "right": bool(clean[i])} for i in new])

    def replay(self, clean: Tensor, logs: Mapping[Threat, AttackLog]) -> None:
        """Put all that any process has stored into the logs and clean (N,) bool: which examples are right without an attack."""
        by_name = {str(threat): log for threat, log in logs.items()}
        for record in self._records():
            if record["task"] == "clean":
                clean[record["point"]] = record["right"]
            elif record["task"] in by_name:
                finished = Attempt(record["run"], record["point"], record["passes"], record["broken"])
                by_name[record["task"]].add([finished])

    def _append(self, records: Sequence[dict[str, Any]]) -> None:
        """Add the records and wait until they are on the disk."""
        if self.path and records:
            with self.path.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())

    def _records(self) -> Iterator[dict[str, Any]]:
        """All records of all processes."""
        for path in sorted(self.folder.glob("progress-*.jsonl")) if self.folder else ():
            for line in path.read_text().splitlines():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    continue


def image_path(folder: Path, threat: Threat) -> Path:
    """Where an evaluation keeps the images of a threat model."""
    return folder / f"adv_{str(threat).replace(' ', '_')}.npy"


def _make_images(path: Path, examples: Examples) -> None:
    """Write the clean images, if there is no such file yet: whole or not at all."""
    if path.exists():
        return
    part = path.with_name(path.name + ".part")
    file = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=tuple(examples.images.shape))
    for index in torch.arange(len(examples)).split(1000):
        file[index.numpy()] = examples.x(index).numpy()
    file.flush()
    part.replace(path)
