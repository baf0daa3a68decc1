"""Checkpoints: written whole or not at all, read without running code; the training state that a run is resumed from."""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import os
import pickle
import re
import time
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor, nn

from utils.arrays import NUMPY_STAND_INS
from utils.text import note_once

# Types that people store beside weights, under the names that pickles give them: argparse's options, and numpy's scalars and arrays, which
# stand-ins read as numbers. numpy's own functions would take a hostile file's numbers for addresses.
HARMLESS: list[Any] = [argparse.Namespace, *((stand_in, name) for name, stand_in in NUMPY_STAND_INS.items())]


# What file systems say of operations that they do not have.
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` at the end: a reader finds the old file or the new one, never a part, after a power cut too.

    Raises OSError, such as on a full disk; after any exception the old file is as it was and nothing is left behind.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            sync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    if os.name == "posix":  # the new name has to reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            sync(folder)
        finally:
            os.close(folder)


def write_atomic(data: bytes | memoryview, path: Path) -> None:
    """Write `path` by way of `new_file`. Raises OSError."""
    with new_file(path) as file:
        file.write(data)


def sync(descriptor: int) -> None:
    """Wait until a file or folder is on the disk; where the file system can't do that, a note. Raises OSError."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        note_once("this file system cannot say when files are on its disk: after a power cut the newest may be missing")


def save_atomic(content: Any, path: Path) -> None:
    """torch.save by way of `write_atomic`. Raises OSError."""
    write_atomic(_saved(content), path)


def save_with_digest(content: Any, stem: Path) -> Path:
    """The same to STEM-DIGEST.pth, whose name ends with the first 16 hex digits of its SHA-256; `matches_digest` checks them."""
    data = _saved(content)
    path = stem.with_name(f"{stem.name}-{hashlib.sha256(data).hexdigest()[:16]}.pth")
    write_atomic(data, path)
    return path


def matches_digest(path: Path) -> bool:
    """Is a file of `save_with_digest` as it was written?"""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16] == path.stem.rpartition("-")[2]


def _saved(content: Any) -> memoryview:
    memory = io.BytesIO()  # to a full disk torch.save itself fails in words of its own, and from a destructor
    torch.save(content, memory)
    return memory.getbuffer()


def load_tensors(path: Path) -> Any:
    """What torch.save wrote to `path`, on the CPU: tensors, numbers, strings, containers, `HARMLESS` types. Raises ValueError.

    Of a .safetensors file: {"state_dict": its tensors}, and what this program wrote beside them.
    """
    from utils.safetensors_files import is_safetensors, load_safetensors  # which writes by way of this module

    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        if is_safetensors(path):
            return load_safetensors(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # of an unusual pickle protocol: what matters is whether it loads
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and _looks_like_a_checkpoint(path):
            raise ValueError(
                f"{path} holds Python objects beside tensors; loading it could run code, so it is refused"
            ) from error
        raise ValueError(f"{path} is not a checkpoint, or is damaged") from error
    except Exception as error:  # whatever reading such bytes raises
        raise ValueError(f"{path} is not a checkpoint, or is damaged") from error


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names and values of a network's state, and of its layers as PyTorch prints them."""
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(model)).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tensors_fingerprint(*tensors: Tensor) -> str:
    """SHA-256 of the values of tensors on the CPU."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _looks_like_a_checkpoint(path: Path) -> bool:
    """A zip archive, as torch writes since 1.6, or a bare pickle; a text file is neither."""
    with path.open("rb") as file:
        return zipfile.is_zipfile(path) or file.read(1) == b"\x80"


KEPT = 2  # states: a newer one that turns out to be damaged leaves the one before it


class Stateful(Protocol):
    """Anything with state to resume from: optimizer, gradient scaler, scheme, metrics."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class NonFiniteError(ArithmeticError):
    """A loss or a weight is infinite or no number."""


class StateFiles:
    """A run's states, folder/STEM_POSITION-DIGEST.pth, of which the newest two are kept; says when, by its seconds, the next is due."""

    def __init__(self, folder: Path, stem: str, seconds: float, writes: bool = True) -> None:
        self.folder, self.stem, self.seconds, self.writes = folder, stem, seconds, writes
        self.last = time.monotonic()

    def due(self) -> bool:
        """Have the seconds passed since the last state?"""
        return self.writes and time.monotonic() - self.last >= self.seconds

    def write(self, position: str, content: dict[str, Any]) -> None:
        """Write a state, whole or not at all; positions sort in the order of time. Raises OSError."""
        if not self.writes:
            return
        save_with_digest(content, self.folder / f"{self.stem}_{position}")
        for old in state_files(self.folder, self.stem)[:-KEPT]:
            old.unlink()
        self.last = time.monotonic()

    def forget(self) -> None:
        """Delete the states, once the run is complete."""
        for path in state_files(self.folder, self.stem) if self.writes else ():
            path.unlink()


class CheckpointManager(StateFiles):
    """A training run's states, state_EPOCH_STEP-DIGEST.pth.

    A state is a checkpoint of the network (with what `about` says of it) that also holds `epoch`, `step` (both count what is done: the
    next training step is `step` of epoch `epoch`, from 0) and the state of each of `parts`. With writes=False nothing is ever written.
    """

    def __init__(
        self,
        folder: Path,
        network: nn.Module,
        about: dict[str, Any],
        parts: Mapping[str, Stateful],
        seconds: float,
        writes: bool = True,
    ) -> None:
        super().__init__(folder, "state", seconds, writes)
        self.network, self.about, self.parts = network, about, parts

    def save(self, epoch: int, step: int, more: Mapping[str, Any]) -> None:
        """Save the state there, with `more` in it, whole or not at all; the one before is kept. Raises NonFiniteError, OSError."""
        if not self.writes:
            return
        check_finite(self.network)
        content = self.about | {"state_dict": self.network.state_dict(), "epoch": epoch, "step": step}
        content |= {"parts": {name: part.state_dict() for name, part in self.parts.items()}, **more}
        self.write(f"{epoch:04d}_{step:06d}", content)

    def restore(self, content: dict[str, Any]) -> None:
        """Put network and parts back into a state's."""
        self.network.load_state_dict(content["state_dict"])
        for name, part in self.parts.items():
            part.load_state_dict(content["parts"][name])


def state_files(folder: Path, stem: str = "state") -> list[Path]:
    """A run's states, oldest first."""
    return sorted(folder.glob(f"{stem}_*.pth"))


def newest_state(folder: Path, stem: str = "state") -> tuple[Path | None, list[Path]]:
    """The newest undamaged state (None if there are no states) and the damaged newer ones. Raises ValueError if all are damaged."""
    damaged: list[Path] = []
    for path in reversed(state_files(folder, stem)):
        if matches_digest(path):
            return path, damaged
        damaged.append(path)
    if damaged:
        raise ValueError(f"no state in {folder} is whole: {', '.join(path.name for path in damaged)}")
    return None, damaged


def check_finite(network: nn.Module) -> None:
    """Raises NonFiniteError if a weight or buffer is infinite or NaN; waits for the device."""
    finite = [tensor.isfinite().all() for tensor in network.state_dict().values() if tensor.is_floating_point()]
    if finite and not bool(torch.stack(finite).all()):
        raise NonFiniteError("the network's weights are not finite")
