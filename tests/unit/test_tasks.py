"""Tasks are owned and bounded; operations outlive their callers and are joined by name."""

from __future__ import annotations

import asyncio

import pytest

from hyperpod.errors import DeadlineExceeded
from hyperpod.tasks import Operations, TaskOwner, bounded


async def test_an_operation_survives_its_caller_and_is_joined() -> None:
    owner = TaskOwner("t")
    operations = Operations(owner)
    go, runs = asyncio.Event(), 0

    async def work() -> str:
        nonlocal runs
        runs += 1
        await go.wait()
        return "done"

    first = asyncio.ensure_future(operations.run("x", work, "this"))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.ensure_future(operations.run("x", work))
    await asyncio.sleep(0)
    assert operations.running("x")
    assert operations.request("x") == "this"
    go.set()
    assert await second == "done"
    assert runs == 1
    await asyncio.sleep(0)
    assert not operations.running("x")
    assert operations.request("x") is None
    await owner.close()


async def test_failures_reach_every_caller() -> None:
    owner = TaskOwner("t")
    operations = Operations(owner)

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("no")

    results = await asyncio.gather(
        operations.run("x", fail), operations.run("x", fail), return_exceptions=True
    )
    assert [str(r) for r in results] == ["no", "no"]
    await owner.close()


async def test_owner_bounds_and_cancels() -> None:
    owner = TaskOwner("t", limit=1)
    task = owner.spawn("a", asyncio.sleep(60))
    with pytest.raises(RuntimeError, match="too many"):
        owner.spawn("b", asyncio.sleep(60))
    await owner.close()
    assert task.cancelled()
    with pytest.raises(RuntimeError, match="closed"):
        owner.spawn("c", asyncio.sleep(60))


async def test_bounded_names_what_took_too_long() -> None:
    with pytest.raises(DeadlineExceeded, match="the thing took longer than 0.01 s"):
        await bounded(asyncio.sleep(60), 0.01, "the thing")
