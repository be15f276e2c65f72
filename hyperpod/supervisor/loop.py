"""Callbacks for readable descriptors, timers and signals; one thread, no hidden state that a fork could break."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterable

Callback = Callable[[], None]


class Loop:
    """`run` until `stop`; the exit code is what `stop` was given."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callback]] = []
        self._order = itertools.count()
        self._signals: dict[int, Callback] = {}
        self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._code: int | None = None
        self.watch(self._wake[0], self._signalled)

    def watch(self, fd: int, callback: Callback) -> None:
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def unwatch(self, fd: int) -> None:
        self._selector.unregister(fd)

    def after(self, seconds: float, callback: Callback) -> None:
        """Call once; it cannot be taken back, so the callback looks whether it still applies."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), callback))

    def on_signals(self, numbers: Iterable[signal.Signals], callback: Callback) -> None:
        for number in numbers:
            self._signals[number] = callback
            signal.signal(number, lambda *_: None)  # the wake-up pipe carries it
        signal.set_wakeup_fd(self._wake[1], warn_on_full_buffer=False)

    def stop(self, code: int) -> None:
        self._code = code

    def run(self) -> int:
        while self._code is None:
            for key, _ in self._selector.select(self._patience()):
                if key.fd in self._selector.get_map():  # not unwatched by an earlier callback of this turn
                    key.data()
            while self._timers and self._timers[0][0] <= time.monotonic():
                heapq.heappop(self._timers)[2]()
        return self._code

    def close(self) -> None:
        """Also for a forked child, which must not touch the parent's epoll set otherwise."""
        self._selector.close()
        for fd in self._wake:
            os.close(fd)

    def _patience(self) -> float | None:
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _signalled(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in dict.fromkeys(os.read(self._wake[0], 4096)):
                if number in self._signals:
                    self._signals[number]()
