"""Several processes of one program, as torchrun starts them; alone, every function does what one process needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@contextmanager
def processes(device: torch.device) -> Iterator[tuple[int, int]]:
    """(rank, number of processes), joined by NCCL for CUDA and gloo otherwise; (0, 1) where torchrun did not start this process."""
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1
        return
    # A process may wait long for one with harder points; if one dies, torchrun ends the others.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=30))
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """This process' own GPU, where torchrun started several on a machine and none is named."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def from_first(function: Callable[[], T]) -> T:
    """What the function gives in the first process, in all of them; where it raises ValueError or OSError, all raise ValueError."""
    if not dist.is_initialized():
        return function()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except (ValueError, OSError) as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise ValueError(box[1])
    value: T = box[0]
    return value


def wait_for_all() -> None:
    """Go on when every process is here."""
    if dist.is_initialized():
        dist.barrier()
