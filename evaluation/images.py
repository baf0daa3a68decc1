"""The images that broke a network, in files that are whole from the start."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from attacks.network import Examples
from attacks.threat import Threat
from utils.checkpoint import UNSUPPORTED, new_file, sync

AROUND = 2**16  # bytes of a .pt file beside those of its tensors, at most


class ImageFile:
    """A .npy file of an image for each example, float32 (N, C, H, W), all of its space taken at the start.

    It is written and read by rows, in place, and not mapped into memory: a full disk is an OSError there, not a SIGBUS.
    """

    def __init__(self, path: Path, examples: Examples) -> None:
        self.path, self.examples = path, examples
        self.file: BinaryIO | None = None
        self.shape = tuple(examples.images.shape)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": self.shape})
        self.header, self.row = header.getvalue(), 4 * math.prod(self.shape[1:])

    def is_whole(self) -> bool:
        """Is there such a file, of the right size?"""
        if not self.path.is_file() or self.path.stat().st_size != len(self.header) + self.row * self.shape[0]:
            return False
        with self.path.open("rb") as file:
            return file.read(len(self.header)) == self.header

    def create(self) -> None:
        """Write it with the clean images: whole or not at all. Raises OSError."""
        with new_file(self.path) as file:
            allocate(file.fileno(), len(self.header) + self.row * self.shape[0])
            file.write(self.header)
            for index in torch.arange(self.shape[0]).split(1000):
                file.write(self.examples.x(index).numpy().astype("<f4", copy=False).tobytes())

    def write(self, index: Sequence[int], images: Tensor) -> None:
        """Put images (B, C, H, W) into these rows. Raises OSError."""
        file = self._opened()
        for place, image in zip(index, images.numpy().astype("<f4", copy=False), strict=True):
            file.seek(len(self.header) + self.row * place)
            file.write(image.tobytes())
        file.flush()

    def read(self, index: Sequence[int]) -> Tensor:
        """The images (B, C, H, W) of these rows; NaN for what the file does not have. Raises OSError."""
        file, rows = self._opened(), []
        for place in index:
            file.seek(len(self.header) + self.row * place)
            data = file.read(self.row)
            rows.append(data if len(data) == self.row else b"\xff" * self.row)
        images = np.frombuffer(b"".join(rows), "<f4").astype(np.float32)
        return torch.from_numpy(images).view(len(index), *self.shape[1:])

    def sync(self) -> None:
        """Wait until what was written is on the disk. Raises OSError."""
        if self.file:
            sync(self.file.fileno())

    def close(self) -> None:
        """Close it, if it is open."""
        if self.file:
            self.file.close()

    def _opened(self) -> BinaryIO:
        self.file = self.file or self.path.open("r+b")
        return self.file


def allocate(file: int, size: int) -> None:
    """Take the space of a file at once, where the system can. Raises OSError, such as on a full disk."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise


def save_as_pt(folder: Path, threat: Threat, labels: Tensor, broken: Tensor) -> None:
    """Write the images of an evaluation that is over as adv_THREAT.pt too, which torch.load reads: whole or not at all. Raises OSError.

    A dictionary of torchattacks' names: adv_inputs (N, C, H, W) float32, labels (N,) int64, save_type; and broken (N,) bool, norm and eps.
    The images go from file to file, not through memory. labels and broken: (N,).
    """
    path = image_path(folder, threat)
    images = torch.from_numpy(np.load(path, mmap_mode="c"))
    # A copy of the labels: a slice would be saved with all that it is a slice of.
    content = {"adv_inputs": images, "labels": labels.clone(), "save_type": "float"}
    content |= {"broken": broken, "norm": threat.norm, "eps": threat.eps}
    with new_file(path.with_suffix(".pt")) as file:
        # On a disk that fills while it writes, torch.save would fail in words of its own.
        allocate(file.fileno(), images.nbytes + labels.nbytes + broken.nbytes + AROUND)
        torch.save(content, file)
        file.truncate()


def image_path(folder: Path, threat: Threat) -> Path:
    """Where an evaluation keeps the images of a threat model."""
    return folder / f"adv_{str(threat).replace(' ', '_')}.npy"
