"""Context managers for eval mode and parameter gradients, random generators by key, non-blocking copies to the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
def no_param_grad(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, no parameter requires a gradient, so that autograd computes only those of the images; afterwards each is as it was."""
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


# Of devices that work while the host goes on: what tells that a copy has arrived.
EVENTS: dict[str, Callable[[], Any]] = {"cuda": torch.cuda.Event, "mps": torch.mps.Event}


class AsyncScalars:
    """A non-blocking device-to-host copy of a tensor from CUDA and MPS; from other devices an ordinary copy."""

    def __init__(self, value: torch.Tensor) -> None:
        event = EVENTS.get(value.device.type)
        self.copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        self.copy.copy_(value, non_blocking=event is not None)
        self.arrived = event() if event else None
        if self.arrived:
            self.arrived.record()

    def numbers(self) -> Any:
        """The copy as a number or nested lists; waits until it is complete."""
        if self.arrived:
            self.arrived.synchronize()
        return self.copy.tolist()
