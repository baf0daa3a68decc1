"""Small pieces of a training loop that know no model, attack or data set."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


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
    """A number on its way from a CUDA device to the host, which goes on meanwhile (other devices are waited for)."""

    def __init__(self, value: torch.Tensor) -> None:
        cuda = value.is_cuda
        self.copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=cuda)
        self.copy.copy_(value, non_blocking=cuda)
        self.arrived = torch.cuda.Event() if cuda else None
        if self.arrived:
            self.arrived.record(torch.cuda.current_stream(value.device))

    def item(self) -> float:
        """The number; waits until it is here."""
        if self.arrived:
            self.arrived.synchronize()
        return self.copy.item()


class Meter:
    """An epoch's losses and accuracies, apart for each of `names` (one row, called clean, if there are none).

    They stay on the device, which is asked for them once, by `record`.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = list(names) or ["clean"]
        self.sums = torch.zeros(len(self.names), 2, device=device)  # of loss, of right answers
        self.seen, self.batches = ([0] * len(self.names) for _ in range(2))
        self.start = time.time()

    def observe(self, index: int, loss: torch.Tensor, right: torch.Tensor) -> None:
        """Count an update: its mean loss, right (B,) bool."""
        self.sums[index] += torch.stack([loss.detach() * len(right), right.sum()])
        self.seen[index] += len(right)
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
    for split, rows in record.get("eval", {}).items():
        line += f"  | {split}: " + " ".join(
            f"{name} {rows[name]['accuracy']:.1f}" for name in rows if name != "average"
        )
    return line
