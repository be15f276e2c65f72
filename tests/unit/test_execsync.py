"""What a shim hands on of a command's output is bounded by who reads it, too."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest

from hyperpod.container import execsync
from hyperpod.errors import GuestError, ResourceExhausted
from hyperpod.shim.collect import END, FAILED, STDERR, STDOUT, TRUNCATED


def record(kind: int, data: bytes = b"") -> bytes:
    return struct.pack("!BI", kind, len(data)) + data


async def read(*sent: bytes) -> tuple[bytes, bytes]:
    """What the daemon makes of these bytes, after which the shim hangs up."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)

    async def send() -> None:
        with theirs:
            for data in sent:
                await asyncio.get_running_loop().sock_sendall(theirs, data)

    sending = asyncio.ensure_future(send())
    try:
        async with asyncio.timeout(10):
            return await execsync._read(ours)
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def test_both_streams_in_any_order() -> None:
    got = await read(
        record(STDOUT, b"a"), record(STDERR, b"x"), record(STDOUT, b"b" * 70_000), record(END), b"rest"
    )
    assert got == (b"a" + b"b" * 70_000, b"x")


@pytest.mark.parametrize(
    "sent",
    [
        (struct.pack("!BI", STDOUT, 2**32 - 1),),
        (record(STDOUT, b"x" * 65536),) * 300,
        (record(STDOUT, b"x"), record(STDOUT)),
        (record(77, b"x"),),
        (record(FAILED, b"because \x1b[31m"),),
    ],
    ids=["huge", "endless", "empty", "unknown", "failed"],
)
async def test_a_shim_that_lies_is_an_error(sent: tuple[bytes, ...]) -> None:
    with pytest.raises(GuestError) as info:
        await read(*sent)
    assert "\x1b" not in str(info.value)


@pytest.mark.parametrize("sent", [(), (record(STDOUT, b"x"),), (record(STDOUT, b"x")[:-1],), (b"\x01",)])
async def test_an_output_without_its_end_is_asked_for_again(sent: tuple[bytes, ...]) -> None:
    with pytest.raises(execsync._CutOffError):
        await read(*sent)


async def test_a_command_that_prints_too_much() -> None:
    with pytest.raises(ResourceExhausted, match="streaming exec"):
        await read(record(STDOUT, b"x"), record(TRUNCATED))


async def test_calls_beyond_the_most_wait_for_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sandbox:
        execs, short = asyncio.Semaphore(1), "abc"

    sandbox, order = Sandbox(), []

    async def second() -> None:
        async with execsync._turn(sandbox):  # type: ignore[arg-type]
            order.append("second")

    async with execsync._turn(sandbox):  # type: ignore[arg-type]
        waiting = asyncio.ensure_future(second())
        await asyncio.sleep(0)
        order.append("first")
    await waiting
    assert order == ["first", "second"]
    monkeypatch.setattr(execsync, "TURN", 0.01)
    async with execsync._turn(sandbox):  # type: ignore[arg-type]
        with pytest.raises(ResourceExhausted, match="calls of ExecSync run in sandbox abc already"):
            await second()
    await second()
