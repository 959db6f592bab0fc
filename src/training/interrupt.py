"""Ctrl-C and the end of a cluster job, as a request to stop after the step."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

from src.training.types import log


class StopRequest:
    """Turns Ctrl-C, or the signal by which a cluster ends a job, into a request to stop after the
    step; the second one stops at once.

    Attributes:
        signal: number of the signal that came; 0 while there was none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0

    def __enter__(self) -> StopRequest:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        # a launcher passes on what the terminal has sent already: within a second that is the same
        if self.signal and time.monotonic() - self._since > 1:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self._since = number, time.monotonic()
            log.warning("stopping after this step; once more to stop at once")
