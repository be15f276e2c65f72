"""Waiting for what blocks: mounts, in threads of their own; the end of processes that are not our children."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from hyperpod.errors import DeadlineExceeded, HyperpodError
from hyperpod.spec.mounts import HostBind

T = TypeVar("T")

MOUNT_TIMEOUT = 20.0
"""Seconds for the sources of one container: one on a file system whose server is away would hang for ever."""

AT_ONCE = 16
"""Mounting threads; one that hangs keeps its place until it is over."""


def mounting(wanted: Sequence[HostBind]) -> str:
    """For errors."""
    return f"mounting {', '.join(sorted({one.source for one in wanted}))[:500]}"


class MountThreads:
    """At most AT_ONCE of them."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(AT_ONCE)

    async def run(self, work: Callable[[], T], what: str, cancelled: threading.Event) -> T:
        """In a thread of its own, which may change its mount namespace, with a deadline that does not end it."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def tell(result: T | None, failure: BaseException | None) -> None:
            self._places.release()
            if done.cancelled():
                return
            if failure is not None:
                done.set_exception(failure)
            else:
                done.set_result(result)  # type: ignore[arg-type]  # a T when nothing failed

        def run() -> None:
            result, failure = None, None
            try:
                result = work()
            except HyperpodError as exc:
                failure = exc
            except OSError as exc:
                failure = HyperpodError(f"{what}: {exc.strerror}")
            if not loop.is_closed():
                loop.call_soon_threadsafe(tell, result, failure)

        try:
            async with asyncio.timeout(MOUNT_TIMEOUT):
                await self._places.acquire()
                threading.Thread(target=run, name="mounting", daemon=True).start()
                return await done
        except TimeoutError as exc:
            cancelled.set()
            raise DeadlineExceeded(f"{what} took longer than {MOUNT_TIMEOUT:.0f} s") from exc


async def process_end(pid: int) -> None:
    """Returns at once when there is no such process."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return
    loop.add_reader(handle, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)
