"""All that a run's next update depends on, kept in its folder so that it can go on after any end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from utils.checkpoint import matches_digest, save_with_digest

KEPT = 2  # states: a newer one that turns out to be damaged leaves the one before it


class Stateful(Protocol):
    """What an update changes: optimizers, scalers, networks, and what counts here."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class NonFiniteError(ArithmeticError):
    """A loss or a weight is infinite or no number."""


class CheckpointManager:
    """Saves a run's state as folder/state_EPOCH_STEP-DIGEST.pth; says when, by its seconds, the next is due.

    A state is a checkpoint of the network (with what `about` says of it) that also holds `epoch`, `step` (both count what is done: the
    next update is batch `step` of epoch `epoch`, from 0) and the state of each of `parts`. With writes=False nothing is ever written.
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
        self.folder, self.network, self.about, self.parts = folder, network, about, parts
        self.seconds, self.writes = seconds, writes
        self.last = time.monotonic()

    def due(self) -> bool:
        """Have the seconds passed since the last save?"""
        return self.writes and time.monotonic() - self.last >= self.seconds

    def save(self, epoch: int, step: int) -> None:
        """Save the state there, whole or not at all; the one before is kept. Raises NonFiniteError, OSError."""
        if not self.writes:
            return
        check_finite(self.network)
        content = self.about | {"state_dict": self.network.state_dict(), "epoch": epoch, "step": step}
        content["parts"] = {name: part.state_dict() for name, part in self.parts.items()}
        save_with_digest(content, self.folder / f"state_{epoch:04d}_{step:06d}")
        for old in state_files(self.folder)[:-KEPT]:
            old.unlink()
        self.last = time.monotonic()

    def restore(self, content: dict[str, Any]) -> None:
        """Put network and parts back into a state's."""
        self.network.load_state_dict(content["state_dict"])
        for name, part in self.parts.items():
            part.load_state_dict(content["parts"][name])

    def forget(self) -> None:
        """Delete the states of a run that is over."""
        for path in state_files(self.folder) if self.writes else ():
            path.unlink()


def state_files(folder: Path) -> list[Path]:
    """A run's states, oldest first."""
    return sorted(folder.glob("state_*.pth"))


def newest_state(folder: Path) -> tuple[Path | None, list[Path]]:
    """A run's newest state that is whole (None if it has none at all) and the newer ones, which are not. Raises ValueError if none is."""
    damaged: list[Path] = []
    for path in reversed(state_files(folder)):
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
