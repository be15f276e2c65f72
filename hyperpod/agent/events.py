"""Exits of containers, numbered, the last ones kept: a host that reconnects asks for what it missed."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import IntEnum

from hyperpod.errors import FailedPrecondition

KEPT = 1024


class State(IntEnum):
    """Of a container; the numbers are those of agent.proto."""

    CREATED = 1
    RUNNING = 2
    EXITED = 3


@dataclass(frozen=True)
class Status:
    """What the host is told of a container. Times: nanoseconds since the epoch, the agent's clock."""

    id: str
    state: State = State.CREATED
    pid: int = 0
    exit_code: int = 0
    oom_killed: bool = False
    started_at_ns: int = 0
    finished_at_ns: int = 0


class EventLog:
    """The last KEPT exits."""

    def __init__(self) -> None:
        self._kept: deque[tuple[int, Status]] = deque(maxlen=KEPT)
        self._news = asyncio.Event()
        self.last = 0
        """Number of the newest event; 0: none yet."""

    def publish(self, status: Status) -> None:
        self.last += 1
        self._kept.append((self.last, status))
        self._news.set()
        self._news = asyncio.Event()

    async def follow(self, after: int) -> AsyncIterator[tuple[int, Status]]:
        """Events after number `after`, for ever. Raises FailedPrecondition when some are not kept any more."""
        while True:
            news = self._news
            for number, status in list(self._kept):
                if number <= after:
                    continue
                if number != after + 1:
                    raise FailedPrecondition(f"events {after + 1} to {number - 1} are not kept any more")
                after = number
                yield number, status
            if news is self._news:
                await news.wait()
