"""Threads that mount: a source that hangs costs one thread, and nobody else anything."""

from __future__ import annotations

import asyncio
import threading

import pytest

from hyperpod.errors import DeadlineExceeded, Unavailable
from hyperpod.sandbox import threads


async def test_a_source_that_hangs_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "MOUNT_TIMEOUT", 0.05)
    mounting, answers, tried = threads.MountThreads(), threading.Event(), 0
    others = threading.active_count()

    def hang() -> None:
        nonlocal tried
        tried += 1
        answers.wait()

    async def attempt(what: str) -> None:
        await mounting.run(hang, what, threading.Event())

    for number in range(2 * threads.AT_ONCE):  # more of them than have places
        with pytest.raises(DeadlineExceeded, match=f"mounting /away/{number} took longer"):
            await attempt(f"mounting /away/{number}")
        with pytest.raises(Unavailable, match=f"mounting /away/{number}: .* still does not answer"):
            await attempt(f"mounting /away/{number}")
    assert tried == 2 * threads.AT_ONCE
    monkeypatch.setattr(threads, "MOUNT_TIMEOUT", 10.0)
    everybody = [mounting.run(lambda: 1, f"mounting /{n}", threading.Event()) for n in range(50)]
    assert await asyncio.gather(*everybody) == [1] * 50
    answers.set()
    while threading.active_count() > others:
        await asyncio.sleep(0.01)
    await attempt("mounting /away/0")
