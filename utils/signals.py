"""SIGTERM, SIGINT and SIGHUP end a run between training steps, where its state is consistent."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Interrupted(BaseException):  # as KeyboardInterrupt: whoever catches Exception does not mean it
    """The run was asked to end; `code` is what a shell expects of a program that this signal ended, 143, 130 or 129."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Signals:
    """Inside, SIGTERM, SIGINT and SIGHUP are noted; they raise Interrupted in `check`, in `at_once`, and nowhere else.

    They are sent twice as a rule (Slurm and torchrun pass on what the terminal has sent already): only the first counts.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # no other may have handlers
            for number in (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])):
                if number != signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN:
                    continue  # as nohup asks
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.received:
            raise Interrupted(self.received)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises Interrupted where it comes: for long computations that do not change the training state."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            return
        self.received = number
        if self._at_once:
            self._at_once = False
            raise Interrupted(number)
