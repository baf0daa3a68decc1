"""Small pieces of a training loop that know no model, attack or data set."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from utils.state import NotFinite


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Every module in eval mode inside; each back in its own mode after (a frozen BatchNorm stays frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """No parameter asks for a gradient inside, so that none is computed or kept for; each as it was after."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield model
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on nothing but the key, such as (seed, epoch, step): resuming needs no saved state."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence([len(key), *key]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    )


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, lr_no_decay: float | None
) -> list[dict[str, object]]:
    """SGD groups as published for training from scratch: decay for weights, none for biases and norm layers (all 1-d parameters).

    lr_no_decay, if given, is the second group's constant rate (the published code's 1.0); else it follows the schedule.
    """
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {
            "params": others,
            "lr": lr if lr_no_decay is None else lr_no_decay,
            "weight_decay": 0.0,
            "constant_lr": lr_no_decay is not None,
        },
    ]


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving averages of weights and BatchNorm's statistics, of which an update keeps the share `decay`; first a copy."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    return average.requires_grad_(False).eval()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every parameter group but those marked `constant_lr`."""
    for group in optimizer.param_groups:
        if not group.get("constant_lr"):
            group["lr"] = lr


def choose_device(name: str) -> torch.device:
    """The device named; `auto` is CUDA if there, else MPS, else the CPU. Raises ValueError if the machine has no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; choose auto, cpu, cuda, cuda:N or mps") from error
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= counts.get(device.type, 0):
        raise ValueError(f"this machine has no device {name!r}; --device=auto takes what there is")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


class OnItsWay:
    """Numbers on their way from a CUDA device to the host, which goes on meanwhile (other devices are waited for)."""

    def __init__(self, value: torch.Tensor) -> None:
        cuda = value.is_cuda
        self.copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=cuda)
        self.copy.copy_(value, non_blocking=cuda)
        self.arrived = torch.cuda.Event() if cuda else None
        if self.arrived:
            self.arrived.record(torch.cuda.current_stream(value.device))

    def numbers(self) -> Any:
        """The number, or nested lists of numbers; waits until they are here."""
        if self.arrived:
            self.arrived.synchronize()
        return self.copy.tolist()


class Watch:
    """Looks at each update one later, so that no device has to finish it before the next is prepared: is its loss finite?"""

    def __init__(self) -> None:
        self.stop = False  # has a process been asked to end?
        self._coming: deque[tuple[str, OnItsWay]] = deque()

    def observe(self, what: str, loss: torch.Tensor, stop: torch.Tensor) -> None:
        """An update, described by `what` in words: its loss (), and in how many processes the run was asked to end ()."""
        self._coming.append((what, OnItsWay(torch.stack([loss, stop]))))

    def look(self, all_but: int = 0) -> None:
        """Look at the updates that were not looked at yet, but the last so many. Raises NotFinite."""
        while len(self._coming) > all_but:
            what, numbers = self._coming.popleft()
            loss, stop = numbers.numbers()
            self.stop |= stop > 0
            if not math.isfinite(loss):
                raise NotFinite(f"the loss of {what} is {loss}")


class Meter:
    """An epoch's losses and accuracies, apart for each of `names` (one row, called clean, if there are none).

    They stay on the device, which is asked for them once, by `record`.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = list(names) or ["clean"]
        self.device = device
        self.reset()

    def reset(self) -> None:
        """A new epoch."""
        self.sums = torch.zeros(len(self.names), 2, device=self.device)  # of loss, of right answers
        self.seen, self.batches = ([0] * len(self.names) for _ in range(2))
        self.start = time.time()

    def state_dict(self) -> dict[str, Any]:
        """Sums and seconds so far."""
        parts = {"sums": self.sums.cpu(), "seen": list(self.seen), "batches": list(self.batches)}
        return parts | {"seconds": time.time() - self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.sums = state["sums"].to(self.device)
        self.seen, self.batches = list(state["seen"]), list(state["batches"])
        self.start = time.time() - state["seconds"]

    def observe(self, index: int, sums: torch.Tensor, seen: int) -> None:
        """Count an update of so many points: sums (2,) of their losses and of right answers."""
        self.sums[index] += sums
        self.seen[index] += seen
        self.batches[index] += 1

    def record(self, epoch: int, lr: float, running_errors: Sequence[float]) -> dict[str, Any]:
        """The epoch's JSON line; a name that was never drawn has null for loss and error. Waits for the device."""
        losses, rights = self.sums.cpu().T.tolist()
        seconds = time.time() - self.start
        running: list[float | None] = [*running_errors] or [None]
        rows = {
            name: {
                "loss": round(losses[i] / self.seen[i], 4) if self.seen[i] else None,
                "error": round(1 - rights[i] / self.seen[i], 4) if self.seen[i] else None,
                "running_error": running[i],
                "drawn": round(self.batches[i] / sum(self.batches), 4),
            }
            for i, name in enumerate(self.names)
        }
        total = {
            "loss": round(sum(losses) / sum(self.seen), 4),
            "error": round(1 - sum(rights) / sum(self.seen), 4),
        }
        speed = {"seconds": round(seconds, 2), "images_per_second": round(sum(self.seen) / seconds, 1)}
        return {"epoch": epoch, "lr": lr, **total, "norms": rows, **speed}


def console_line(record: dict[str, Any], epochs: int) -> str:
    """The epoch in one line."""
    norms = "; ".join(
        f"{name} loss {row['loss']:.3f} error {100 * row['error']:.1f} % drawn {100 * row['drawn']:.0f} %"
        if row["drawn"]
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
