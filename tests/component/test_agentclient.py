"""The agent client against an agent that lies, floods, stalls or breaks HTTP/2: hyperpod errors, and bounds."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from hyperpod.agentclient import client as client_module
from hyperpod.agentclient.channel import MAX_MESSAGE
from hyperpod.agentclient.client import AgentClient
from hyperpod.agentclient.protocol import BURST, FRAME_COST, MAX_UNSENT, RATE, Budget
from hyperpod.agentclient.types import ContainerInfo, Security
from hyperpod.api.gen.hyperpod.agent import v1
from hyperpod.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    GuestError,
    HyperpodError,
    NotFound,
    ProtocolError,
    Unavailable,
)
from hyperpod.model.security import IdMapping, UserNamespace
from hyperpod.sandbox.session import AgentSession
from tests.hostilepeer import Call, Script, hostile

ID = "ab" * 32


@pytest.fixture(autouse=True)
def nothing_reaches_the_loop() -> Iterator[None]:
    """What a guest does must never end in the loop's exception handler."""
    seen: list[str] = []
    loop_class = asyncio.BaseEventLoop
    original = loop_class.call_exception_handler
    loop_class.call_exception_handler = lambda _, context: seen.append(repr(context))  # type: ignore[method-assign,assignment]
    try:
        yield
        gc.collect()
    finally:
        loop_class.call_exception_handler = original  # type: ignore[method-assign]
    assert seen == []


def replying(payload: bytes) -> Script:
    async def script(call: Call) -> None:
        call.reply(payload)

    return script


@pytest.mark.parametrize(
    "payload",
    [
        b"\x0d\x00\x00\x00\x00",  # api_version as fixed32
        b"\x10\x05",  # agent_version as a number
        b"\x12\x02\xff\xfe",  # and not UTF-8
        b"\x12\x7f",  # truncated
        b"\x0b",  # a group
        b"\xf8\x07\x00" * 9000,  # too many unknown fields
    ],
)
async def test_a_reply_that_is_none(tmp_path: Path, payload: bytes) -> None:
    async with hostile(tmp_path, replying(payload)) as (agent, client):
        with pytest.raises(ProtocolError):
            await client.hello(host_time_ns=1, entropy=b"", hostname="", sysctls={})
        assert agent.errors == []


@pytest.mark.parametrize(
    "state",
    [
        v1.ContainerState(id="x" * 64, state=v1.ContainerStatus.EXITED),
        v1.ContainerState(id=ID[:-1], state=v1.ContainerStatus.EXITED),
        v1.ContainerState(id=ID, state=v1.ContainerStatus.UNSPECIFIED),
        v1.ContainerState(id=ID, state=v1.ContainerStatus(77)),
        v1.ContainerState(id=ID, state=v1.ContainerStatus.EXITED, exit_code=256),
        v1.ContainerState(id=ID, state=v1.ContainerStatus.EXITED, exit_code=-1),
    ],
)
async def test_states_that_cannot_be(tmp_path: Path, state: v1.ContainerState) -> None:
    payload = bytes(v1.ListContainersResponse(containers=[state]))
    async with hostile(tmp_path, replying(payload)) as (_, client):
        with pytest.raises(GuestError):
            await client.list_containers()


@pytest.mark.parametrize(
    "user",
    [
        bytes(v1.User(uid=2**32 - 1)),
        bytes(v1.User(gid=2**32 - 1)),
        bytes(v1.User(groups=[5, 2**32 - 1])),
        bytes(v1.User(groups=list(range(5000)))),
        b"\x08" + b"\xff" * 9 + b"\x01",  # uid: 64 bits
    ],
)
async def test_users_that_cannot_be(tmp_path: Path, user: bytes) -> None:
    length = len(user)
    prefix = bytes([0x0A, length & 127 | 128, length >> 7])  # a varint of two bytes, whatever the length
    async with hostile(tmp_path, replying(prefix + user)) as (_, client):
        with pytest.raises((GuestError, ProtocolError)):
            await client.create_container(ID, oci_spec=b"{}", layers=[], security=Security(user="bob"))


async def test_an_agent_that_knows_of_no_user_namespaces(tmp_path: Path) -> None:
    """It would run containers as the machine's root."""
    ids = IdMapping(host_id=1000, length=10)
    asked = UserNamespace(uids=ids, gids=ids)
    async with hostile(tmp_path, replying(bytes(v1.HelloResponse(agent_version="0.0")))) as (_, client):
        with pytest.raises(FailedPrecondition, match=r"agent \(0\.0\) makes no user namespaces"):
            await client.hello(host_time_ns=1, entropy=b"", hostname="", sysctls={}, userns=asked)


async def test_texts_are_escaped_and_bounded(tmp_path: Path) -> None:
    payload = bytes(v1.HelloResponse(agent_version="a\x1b[2J" * 1000))
    async with hostile(tmp_path, replying(payload)) as (_, client):
        answer = await client.hello(host_time_ns=1, entropy=b"", hostname="", sysctls={})
        assert len(answer.agent_version) < 300
        assert answer.agent_version.isprintable()

    async def refuse(call: Call) -> None:
        call.headers(("grpc-status", "5"), ("grpc-message", "%1B[31m" + "x" * 9000), end=True)

    async with hostile(tmp_path, refuse) as (_, client):
        with pytest.raises(NotFound) as info:
            await client.start_container(ID)
        assert len(str(info.value)) < 1200
        assert str(info.value).isprintable()


async def test_a_failure_that_nobody_foresaw_names_what_failed(tmp_path: Path) -> None:
    """As one for want of memory in the guest, of which grpclib tells no more than this."""

    async def fail(call: Call) -> None:
        call.headers(("grpc-status", "2"), ("grpc-message", "Internal Server Error"), end=True)

    async with hostile(tmp_path, fail) as (_, client):
        with pytest.raises(GuestError, match="the agent failed at RemoveContainer: Internal Server Error"):
            await client.remove_container(ID)


async def test_a_deadline_is_one_whoever_notices_it(tmp_path: Path) -> None:
    """While the daemon is busy the agent's word of it comes before its own timer is looked at."""

    async def late(call: Call) -> None:
        call.headers(("grpc-status", "4"), end=True)

    async with hostile(tmp_path, late) as (_, client):
        with pytest.raises(DeadlineExceeded, match="WaitExec in time"):
            await client.wait_exec(ID, "e", timeout=60)


async def oversize(call: Call) -> None:
    call.headers()
    call.data(b"\0\xff\xff\xff\xff")


async def just_too_big(call: Call) -> None:
    call.headers()
    call.data(b"\0" + (MAX_MESSAGE + 1).to_bytes(4, "big"))


async def compressed(call: Call) -> None:
    call.headers()
    call.data(b"\1\0\0\0\0")
    call.trailers()


async def half(call: Call) -> None:
    call.headers()
    call.data(b"\0\0\0\0\x09abc")
    call.trailers()


async def nothing(call: Call) -> None:
    call.headers()
    call.trailers()


async def trailers_only(call: Call) -> None:
    call.headers(("grpc-status", "0"), end=True)


async def odd_status(call: Call) -> None:
    call.headers(("grpc-status", "weird"), end=True)


async def no_type(call: Call) -> None:
    call.peer.h2.send_headers(call.stream, [(":status", "200")], end_stream=True)
    call.peer.flush()


async def reset(call: Call) -> None:
    call.peer.h2.reset_stream(call.stream, error_code=2)
    call.peer.flush()


async def goaway(call: Call) -> None:
    call.peer.h2.close_connection()
    call.peer.flush()


async def hang_up(call: Call) -> None:
    call.peer.writer.close()


async def push(call: Call) -> None:
    # Not ours to push on? h2's default lets a server do it; `:path: /` and friends as indexed fields.
    call.peer.frame(5, 4, call.stream, b"\0\0\0\x02\x82\x84\x86\x41\x01a")


async def informational(call: Call) -> None:
    for _ in range(3):
        call.peer.h2.send_headers(call.stream, [(":status", "103")])
    call.peer.flush()
    call.reply(b"\x0d")


async def not_ascii(call: Call) -> None:
    call.peer.frame(1, 4, call.stream, b"\x88\x00\x01a\x02\xff\xfe")


async def huge_headers(call: Call) -> None:
    literal = b"\x00\x01a\x7f\xe9\x7d" + b"b" * (127 + 125 * 128)  # 16,252 bytes: one CONTINUATION full
    call.peer.frame(1, 0, call.stream, b"\x88")
    for _ in range(40):
        call.peer.frame(9, 0, call.stream, literal[:16384])
    call.peer.frame(9, 4, call.stream, b"")


async def endless_continuation(call: Call) -> None:
    call.peer.frame(1, 0, call.stream, b"\x88")
    for _ in range(1000):
        call.peer.frame(9, 0, call.stream, b"")


async def garbage(call: Call) -> None:
    call.peer.raw(bytes(range(256)) * 20)


async def giant_frame(call: Call) -> None:
    call.peer.raw(b"\xff\xff\xff\0\0" + call.stream.to_bytes(4, "big") + bytes(100_000))


async def settings_nonsense(call: Call) -> None:
    call.peer.frame(4, 0, 0, b"\0\x04\xff\xff\xff\xff")


BROKEN = [
    oversize, just_too_big, compressed, half, nothing, trailers_only, odd_status, no_type, reset,
    goaway, hang_up, push, informational, not_ascii, huge_headers, endless_continuation, garbage, giant_frame,
    settings_nonsense,
]  # fmt: skip


@pytest.mark.parametrize("script", BROKEN, ids=lambda s: s.__name__)
async def test_broken_answers_end_the_call_at_once(tmp_path: Path, script: Script) -> None:
    """Long before its own deadline of 90 s, and by an error of ours."""
    async with hostile(tmp_path, script) as (agent, client):
        async with asyncio.timeout(30):
            with pytest.raises((ProtocolError, GuestError, Unavailable)):
                await client.start_container(ID)
        assert agent.errors == []


@pytest.mark.parametrize("script", BROKEN, ids=lambda s: s.__name__)
async def test_broken_answers_end_the_events_too(tmp_path: Path, script: Script) -> None:
    async with hostile(tmp_path, script) as (_, client):
        async with asyncio.timeout(30):
            try:
                async for event in client.events(0):
                    pytest.fail(f"{event} out of nothing")
            except HyperpodError:
                pass


@pytest.mark.parametrize("trickle", [b"", b"\0", b"\0\0\0\0\x20abc"])
async def test_a_stalled_answer_meets_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trickle: bytes
) -> None:
    async def script(call: Call) -> None:
        call.headers()
        call.data(trickle)

    monkeypatch.setattr(client_module, "SHORT", 0.3)
    async with hostile(tmp_path, script) as (_, client), asyncio.timeout(30):
        with pytest.raises(DeadlineExceeded, match="ListContainers"):
            await client.list_containers()


async def test_a_call_that_ends_by_itself_leaves_no_cancellation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """grpclib cancels the task: a timeout around it that fires later must still be a TimeoutError."""

    async def script(call: Call) -> None:
        if call.method == "WaitExec":
            call.peer.writer.close()

    monkeypatch.setattr(client_module, "SHORT", 0.1)
    async with hostile(tmp_path, script) as (_, client):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                with pytest.raises(DeadlineExceeded):
                    await client.list_containers()
                with pytest.raises(Unavailable):
                    await client.wait_exec(ID, "e")
                await asyncio.Event().wait()


async def test_two_reasons_at_once_end_a_call_once(tmp_path: Path) -> None:
    """A reset stream and a lost connection in one packet: an error, not a cancellation that nobody asked for."""

    async def script(call: Call) -> None:
        call.peer.h2.reset_stream(call.stream)
        call.peer.flush()
        call.peer.raw(b"\xff" * 100)

    async with hostile(tmp_path, script) as (_, client):
        with pytest.raises(Unavailable):
            await client.wait_exec(ID, "e")
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0


async def test_a_cancellation_at_the_deadline_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = asyncio.Event()

    async def script(call: Call) -> None:
        called.set()

    monkeypatch.setattr(client_module, "SHORT", 2.0)
    loop = asyncio.get_running_loop()
    async with hostile(tmp_path, script) as (_, client):
        task = asyncio.ensure_future(client.list_containers())
        await called.wait()
        # Both timers are due when the loop looks again.
        loop.call_at(loop.time() + 2.1, task.cancel)
        time.sleep(2.2)  # the loop is busy, on purpose
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_events_that_repeat_or_are_empty(tmp_path: Path) -> None:
    good = v1.Event(seq=5, exited=v1.ContainerState(id=ID, state=v1.ContainerStatus.EXITED))

    async def script(call: Call) -> None:
        call.headers()
        call.data(message_of(good) + message_of(good))

    def message_of(event: v1.Event) -> bytes:
        raw = bytes(event)
        return b"\0" + len(raw).to_bytes(4, "big") + raw

    async with hostile(tmp_path, script) as (_, client), asyncio.timeout(30):
        seen = []
        with pytest.raises(ProtocolError, match="after 5"):
            async for event in client.events(4):
                seen.append(event.seq)
        assert seen == [5]


def test_the_budget_lets_bursts_pass_and_slows_floods() -> None:
    budget = Budget(0.0)
    assert budget.spend(BURST, 0.0) == 0.0
    assert budget.spend(RATE, 0.0) == pytest.approx(1.0)
    assert budget.spend(0, 1.0) == 0.0
    assert budget.spend(BURST, 1000.0) == 0.0
    assert budget.spend(RATE // 2, 1000.0) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["ping", "empty data", "settings", "window", "priority"])
async def test_a_flood_of_cheap_frames_keeps_no_memory(tmp_path: Path, kind: str) -> None:
    """Nor does it starve others on the loop: reading rests once the budget is spent."""
    sent = 0

    async def script(call: Call) -> None:
        nonlocal sent
        call.headers()
        frame = {
            "ping": (6, 0, 0, b"\0" * 8),
            "empty data": (0, 0, call.stream, b""),
            "settings": (4, 0, 0, b""),
            "window": (8, 0, 0, b"\0\0\0\1"),
            "priority": (2, 0, call.stream, b"\0\0\0\0\0"),
        }[kind]
        while sent < 200_000:
            for _ in range(100):
                call.peer.frame(*frame)
            sent += 100
            await call.peer.writer.drain()  # the answers are never read

    async with hostile(tmp_path, script) as (_, client):
        waiting = asyncio.ensure_future(client.wait_exec(ID, "e"))
        await asyncio.sleep(0.1)
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            await asyncio.sleep(2)
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert after - before < 4 * MAX_UNSENT
        # At most what the budget gave, plus what two socket buffers and asyncio's own hold.
        assert sent < (BURST + 10 * RATE) / FRAME_COST + 2 * 1024 * 1024 / 9
        await client.close()
        with pytest.raises(HyperpodError):
            await waiting


async def test_a_client_that_closes_does_not_wait_for_a_deaf_peer(tmp_path: Path) -> None:
    async def script(call: Call) -> None:
        await asyncio.Event().wait()

    async with hostile(tmp_path, script) as (_, client):
        first = asyncio.ensure_future(client.wait_exec(ID, "e"))
        await asyncio.sleep(0.1)
        big = asyncio.ensure_future(client.create_container(ID, oci_spec=b"x" * 3_000_000, layers=[]))
        await asyncio.sleep(0.2)
        channel = client._channel
        assert channel is not None
        transport = channel._protocol._transport  # type: ignore[union-attr]
        await client.close()
        for call in (first, big):
            with pytest.raises(Unavailable):
                await asyncio.wait_for(call, 10)
        await asyncio.sleep(0.05)
        assert transport.get_extra_info("socket").fileno() == -1


async def test_a_session_catches_up_when_events_are_not_kept(tmp_path: Path) -> None:
    """The agent keeps the last 1024 exits: a daemon that asks for older ones lists the containers instead."""
    asked: list[int] = []

    async def script(call: Call) -> None:
        match call.method:
            case "Hello":
                call.reply(bytes(v1.HelloResponse(event_seq=5000)))
            case "ListContainers":
                call.reply(b"")
            case "Events" if not asked:
                asked.append(0)
                call.headers(("grpc-status", "9"), end=True)
            case "Events":
                event = v1.Event(seq=5001, exited=v1.ContainerState(id=ID, state=v1.ContainerStatus.EXITED))
                call.headers()
                call.data(b"\0" + len(bytes(event)).to_bytes(4, "big") + bytes(event))

    exits: asyncio.Queue[ContainerInfo] = asyncio.Queue()
    listed: list[object] = []

    async def connected(client: AgentClient) -> None:
        listed.append(await client.list_containers())

    async with hostile(tmp_path, script) as (agent, _):
        session = AgentSession(agent.sandbox, agent.endpoint, agent.token)
        await session.connect(asyncio.get_running_loop().time() + 20, claim=False)
        follow = asyncio.ensure_future(session.follow(exits.put, connected))
        assert (await asyncio.wait_for(exits.get(), 20)).id == ID
        assert listed == [[]]
        follow.cancel()
        await asyncio.gather(follow, return_exceptions=True)
        await session.close()


async def test_a_session_does_not_spin_on_an_agent_that_answers_nonsense(tmp_path: Path) -> None:
    async with hostile(tmp_path, replying(b"\x0b")) as (agent, _):
        session = AgentSession(agent.sandbox, agent.endpoint, agent.token)
        await session.connect(asyncio.get_running_loop().time() + 20, claim=False)

        async def connected(client: AgentClient) -> None:
            await client.list_containers()

        async def ignore(_: ContainerInfo) -> None: ...

        follow = asyncio.ensure_future(session.follow(ignore, connected))
        await asyncio.sleep(1.5)
        assert agent.connections < 15
        async with asyncio.timeout(20):
            while agent.connections <= 2:  # it does try again
                await asyncio.sleep(0.05)
        follow.cancel()
        await asyncio.gather(follow, return_exceptions=True)
        await session.close()
