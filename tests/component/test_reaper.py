"""The agent's reaper on this process's children."""

from __future__ import annotations

import asyncio
import os
import signal

from hyperpod.agent.reaper import Reaper


async def test_an_end_is_noticed_by_a_loop_that_sleeps_already() -> None:
    """Between Python's last look at signals and the system call that waits, its handlers do not run."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    reaper = Reaper()
    try:
        signal.signal(signal.SIGCHLD, lambda *_: None)
        _, ended = reaper.spawn(["/bin/sh", "-c", "exit 3"], null, null, null)
        async with asyncio.timeout(10):
            assert await ended == 3
    finally:
        reaper.close()
        os.close(null)


async def test_another_s_pipe_for_signals_stays() -> None:
    """The loop's own, of a process with handlers for more."""
    loop = asyncio.get_running_loop()
    reaper = Reaper()
    loop.add_signal_handler(signal.SIGUSR2, lambda: None)
    try:
        reaper.close()
        current = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(current)
        assert current != -1
    finally:
        loop.remove_signal_handler(signal.SIGUSR2)
