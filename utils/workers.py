"""Worker processes that prefetch mini-batches: they ignore the signals meant for the main process, and end with it."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Iterator
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


def load_ahead(
    batches: Dataset[tuple[Tensor, Tensor]], numbers: range, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """batches[i] for i in numbers, made by worker processes; in pinned memory for CUDA, so that the copy to the device is asynchronous."""
    loader: DataLoader[Any] = DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # else it would draw a seed from the global one
    )
    try:
        yield from _started(loader)
    except BaseException as error:
        # The frames would keep the workers, and lose them to the garbage collector.
        traceback.clear_frames(error.__traceback__)
        raise


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """Its iterator. The workers begin with signals blocked: none can end one before it has said that it ignores them."""
    if not hasattr(signal, "sigwaitinfo"):
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process, and the main one answers them; a worker ends when that one tells it to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none: there anybody's SIGTERM ends a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    # multiprocessing ends by SIGTERM the workers that an error's traceback keeps alive, and waits for them.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
