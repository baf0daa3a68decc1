"""Worker processes that prefetch mini-batches: they ignore the signals meant for the main process, and end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


class WorkerPool:
    """Processes that make `dataset[item]` ahead of time, in pinned memory for CUDA, so that the copy to the device is asynchronous.

    They start with the first call of `load`, stay for the next ones, and end with `close` or with the process that started them.
    """

    def __init__(self, dataset: Dataset[Any], workers: int, device: torch.device) -> None:
        self.items: list[Any] = []
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=None,
            sampler=self.items,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # else it would draw a seed from the global one
            persistent_workers=True,
        )

    def load(self, items: Sequence[Any]) -> Iterator[Any]:
        """dataset[item] for each item, in order."""
        self.items[:] = items
        yield from _with_blocked_signals(lambda: iter(self.loader))

    def close(self) -> None:
        """End the processes, also while a traceback still holds what they made."""
        if iterator := getattr(self.loader, "_iterator", None):
            iterator._shutdown_workers()
            self.loader._iterator = None


def _with_blocked_signals(start: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """start(), which may start workers. They begin with signals blocked: none can end one before it has said that it ignores them."""
    if not hasattr(signal, "sigwaitinfo"):
        return start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process, and the main one answers them; a worker ends when that one tells it to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = multiprocessing.parent_process()  # os.getppid() is the fork server, if there is one
    assert main is not None
    Thread(target=_end_with, args=(main.sentinel,), daemon=True).start()
    if hasattr(signal, "sigwaitinfo"):  # macOS has none: there anybody's SIGTERM ends a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_if_asked_by, args=(main.pid,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """End this process when the main one does, however that ends."""
    wait([sentinel])
    os._exit(0)


def _end_if_asked_by(pid: int) -> None:
    # multiprocessing ends by SIGTERM the workers that an error's traceback keeps alive, and waits for them.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != pid:
        pass
    os._exit(0)
