"""How grpclib ends a call that waits: it cancels the caller's task and turns that into an error.

grpclib 0.4.9 neither takes the cancellation back (Task.uncancel), so every asyncio.timeout around the call
would believe in one from outside, nor keeps it to one, nor tells it from a real one of the same moment, which
is then lost. Here all three are mended.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from grpclib.utils import DeadlineWrapper, Wrapper


class CallWrapper(Wrapper):
    """For one task, as all calls of the agent client are."""

    def __init__(self) -> None:
        super().__init__()
        self._before = 0
        self._ours = False

    def __enter__(self) -> None:
        super().__enter__()
        [task] = self._tasks
        self._before = task.cancelling()

    def cancel(self, error: Exception) -> None:
        """Wake the call with `error`; the first one counts."""
        if self._error is None:
            self._ours = bool(self._tasks)
            super().cancel(error)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self._ours:
            self._ours = False
            if task.uncancel() > self._before and exc_type is asyncio.CancelledError:
                self._tasks.discard(task)
                return  # the caller is being cancelled as well: that goes on
        super().__exit__(exc_type, exc_val, exc_tb)


class DeadlineCallWrapper(CallWrapper, DeadlineWrapper):
    """The same with a deadline."""
