"""What a long computation has finished so far, kept so that it can go on after any end: lines of JSON, and images beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


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


class ImageFile:
    """Float32 images (N, C, H, W) in a .npy file that is written in place and never read into memory as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images: np.memmap[Any, Any] = np.lib.format.open_memmap(path, mode="r+")

    @staticmethod
    def make(path: Path, n: int, images: Callable[[Tensor], Tensor], chunk: int = 1000) -> None:
        """Write `images(index)` for all n points, if there is no such file yet: whole or not at all."""
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
