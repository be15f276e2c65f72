"""Waiting for what blocks: mounts, in threads of their own; the end of processes that are not our children."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from hyperpod.errors import DeadlineExceeded, HyperpodError, Unavailable
from hyperpod.spec.mounts import HostBind

T = TypeVar("T")

MOUNT_TIMEOUT = 20.0
"""Seconds for the sources of one container: one on a file system whose server is away would hang for ever."""

AT_ONCE = 16
"""Mounting threads, without those that nobody waits for any more."""


def mounting(wanted: Sequence[HostBind]) -> str:
    """For errors."""
    return f"mounting {', '.join(sorted({one.source for one in wanted}))[:500]}"


class MountThreads:
    """At most AT_ONCE of them, and for each thing that hangs one more: a source whose server is away keeps its
    thread until it answers, and neither others from mounting nor a kubelet, which tries again, from being told."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(AT_ONCE)
        self._hanging: set[str] = set()

    async def run(self, work: Callable[[], T], what: str, cancelled: threading.Event) -> T:
        """In a thread of its own, which may change its mount namespace, with a deadline that does not end it.

        `what`: for errors; two that are alike do the same. Raises DeadlineExceeded, Unavailable for one that hangs
        since an earlier call."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        if what in self._hanging:
            raise Unavailable(f"{what}: it was tried before, and something still does not answer")
        running = False

        def tell(result: T | None, failure: BaseException | None) -> None:
            nonlocal running
            running = False
            if cancelled.is_set():
                self._hanging.discard(what)
            else:
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
                running = True
                threading.Thread(target=run, name="mounting", daemon=True).start()
                return await done
        except TimeoutError as exc:
            if running:
                cancelled.set()
                self._hanging.add(what)
                self._places.release()
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
