"""Small pieces of a training loop that know no model, attack or data set."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from utils.modules import AsyncScalars
from utils.state import NonFiniteError


class NonFiniteGuard:
    """Looks at each update one later, so that no device has to finish it before the next is prepared: is its loss finite?"""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.stop = False  # has a process been asked to end?
        self._coming: deque[tuple[str, AsyncScalars]] = deque()

    def observe(self, what: str, losses: torch.Tensor, stop: torch.Tensor) -> None:
        """An update, described by `what` in words: its loss and those of each name, (1 + names,); processes asked to end, ()."""
        self._coming.append((what, AsyncScalars(torch.cat([stop[None], losses]))))

    def look(self, all_but: int = 0) -> None:
        """Look at the updates that were not looked at yet, but the last so many. Raises NonFiniteError."""
        while len(self._coming) > all_but:
            what, numbers = self._coming.popleft()
            stop, loss, *losses = numbers.numbers()
            self.stop |= stop > 0
            if not math.isfinite(loss):
                odd = [name for name, one in zip(self.names, losses, strict=True) if not math.isfinite(one)]
                raise NonFiniteError(f"the loss of {what}{' (' + ', '.join(odd) + ')' if odd else ''} is {loss}")


@dataclass
class PassCounter:
    """Images that went forward through a network in this process, and back to their gradients."""

    forward: int = 0
    backward: int = 0

    def of(self, network: Callable[[torch.Tensor], Any], learns: bool) -> Callable[[torch.Tensor], Any]:
        """The network, its calls counted here; backward if it learns from them, else where images ask for their gradient."""

        def counted(x: torch.Tensor) -> Any:
            self.forward += len(x)
            self.backward += len(x) * (learns or x.requires_grad)
            return network(x)

        return counted


def per_threat_sums(logits: torch.Tensor, y: torch.Tensor, row: torch.Tensor, rows: int) -> torch.Tensor:
    """Sums over views of images, apart for each row: (rows, 3) of cross-entropy, right answers, how many.

    logits (V, B, K), y (B,), row (V, B) int64: which row a view counts for.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="none").view_as(row)
    right = (logits.argmax(2) == y).to(losses.dtype)
    values = torch.stack([losses, right, torch.ones_like(losses)], 2)
    mine = row[..., None, None] == torch.arange(rows, device=row.device)[:, None]
    return torch.where(mine, values[:, :, None], 0).sum((0, 1))  # `where`: another row's NaN must not spread


class EpochMetrics:
    """An epoch's losses and accuracies, apart for each of `norms` and for clean images.

    They stay on the device, which is asked for them once, by `record`.
    """

    def __init__(self, norms: Sequence[str], device: torch.device) -> None:
        self.norms, self.device, self.passes = list(norms), device, PassCounter()
        self.reset()

    def reset(self) -> None:
        """A new epoch."""
        self.sums = torch.zeros(len(self.norms) + 1, 3, device=self.device)
        self.points = self.points_here = self.passes.forward = self.passes.backward = 0
        self.passes_before = dict(vars(self.passes))  # those of whole updates: a signal may end an attack in the middle
        self.start = time.time()

    def state_dict(self) -> dict[str, Any]:
        """Sums and seconds so far."""
        parts = {"sums": self.sums.cpu(), "points": self.points, "points_here": self.points_here}
        return parts | self.passes_before | {"seconds": time.time() - self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.sums = state["sums"].to(self.device)
        self.points, self.points_here = state["points"], state["points_here"]
        self.passes.forward, self.passes.backward = state["forward"], state["backward"]
        self.passes_before = dict(vars(self.passes))
        self.start = time.time() - state["seconds"]

    def observe(self, sums: torch.Tensor, points: int, points_here: int) -> None:
        """Count an update of so many images, so many of them in this process: what `log` says of all, (norms + 1, 3)."""
        self.sums += sums
        self.points += points
        self.points_here += points_here
        self.passes_before = dict(vars(self.passes))

    def record(self, epoch: int, lr: float, running_errors: Sequence[float]) -> dict[str, Any]:
        """The epoch's JSON line. A norm that was never met has null for loss and error; clean images have a row if there were any.

        drawn: the norm's share of the adversarial points. passes: through the network, an image. Waits for the device.
        """
        sums = self.sums.cpu()
        seconds = time.time() - self.start
        adversarial = float(sums[:-1, 2].sum())
        running: list[float | None] = [*running_errors, None]
        rows = {}
        for name, (loss, right, seen), error in zip([*self.norms, "clean"], sums.tolist(), running, strict=True):
            if seen or name != "clean":
                rows[name] = {
                    "loss": round(loss / seen, 4) if seen else None,
                    "error": round(1 - right / seen, 4) if seen else None,
                    "running_error": error,
                    "drawn": (round(seen / adversarial, 4) if adversarial else 0.0) if name != "clean" else None,
                }
        loss, right, seen = (sums[:-1].sum(0) if adversarial else sums[-1]).tolist()
        total = {"loss": round(loss / seen, 4), "error": round(1 - right / seen, 4)}
        passes = {name: round(number / max(self.points_here, 1), 2) for name, number in vars(self.passes).items()}
        speed = {"seconds": round(seconds, 2), "images_per_second": round(self.points / seconds, 1)}
        return {"epoch": epoch, "lr": lr, **total, "norms": rows, "passes": passes, **speed}


def console_line(record: dict[str, Any], epochs: int) -> str:
    """The epoch in one line."""
    norms = "; ".join(
        f"{name} loss {row['loss']:.3f} error {100 * row['error']:.1f} %"
        + (f" drawn {100 * row['drawn']:.0f} %" if row["drawn"] else "")
        if row["loss"] is not None
        else f"{name} not drawn"
        for name, row in record["norms"].items()
    )
    line = f"epoch {record['epoch']}/{epochs}  lr {record['lr']:.4g}  {norms}  {record['seconds']:.1f} s"
    for kind in ("eval", "eval_ema"):
        for split, rows in record.get(kind, {}).items():
            line += f"  | {split}{kind.removeprefix('eval')}: " + " ".join(
                f"{name} {rows[name]['accuracy']:.1f}" for name in rows if name != "average"
            )
    return line
