"""The server kit against independent clients: each defect of grpclib that it works round."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
import subprocess
import sys

import grpc
import hpack
import pytest
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame, HeadersFrame

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.errors import FailedPrecondition
from hyperpod.rpc.connection import LAST_STREAM, MAX_STREAMS, MESSAGE_LIMIT
from hyperpod.rpc.server import RpcServer
from tests.component.rpckit import (
    Service,
    bare,
    call,
    channel,
    code,
    server,
    until_idle,
    until_running,
)


def request(ident: str) -> bytes:
    return bytes(cri.StartContainerRequest(container_id=ident))


# -- answers -----------------------------------------------------------------------------------------------


async def test_unknown_methods_are_unimplemented() -> None:
    async with server() as (_, _, path), channel(path) as made:
        assert await code(made, "NoSuchThing") == (
            "UNIMPLEMENTED",
            "no method /runtime.v1.RuntimeService/NoSuchThing",
        )
        assert b"0.1.0" in await call(made, "Version")
        async with bare(path) as client:
            await client.request(1, "NoSuchThing")
            assert (await client.answer())["content-type"].startswith("application/grpc")


async def test_errors_are_mapped_once() -> None:
    async with server() as (_, _, path), channel(path) as made:
        assert await code(made, "StartContainer", request("missing")) == (
            "NOT_FOUND",
            "no container 'missing': \\xe2\\x98\\x83 100%",
        )
        assert await code(made, "StartContainer", request("group")) == ("NOT_FOUND", "in a group")
        assert (await code(made, "StartContainer", request("late")))[0] == "DEADLINE_EXCEEDED"
        status, text = await code(made, "StartContainer", request("key"))
        assert status == "INTERNAL"
        assert "secret" not in text


async def test_a_wait_that_is_cancelled_by_others_still_gets_an_answer() -> None:
    async with server() as (_, _, path), channel(path) as made:
        assert (await code(made, "StartContainer", request("cancelled")))[0] == "ABORTED"


async def test_requests_that_do_not_parse_are_the_callers_fault() -> None:
    async with server() as (_, _, path), channel(path) as made:
        assert await code(made, "StartContainer", b"\x0a\x05ab") == (
            "INVALID_ARGUMENT",
            "StartContainerRequest does not parse: 5 bytes announced, 2 left at byte 2",
        )


async def test_compression_is_refused_with_a_reason() -> None:
    async with server() as (_, _, path), channel(path) as made:
        status, text = await code(made, "Version", b"", compression=grpc.Compression.Gzip)
        assert status == "UNIMPLEMENTED"
        assert "gzip" in text
        async with bare(path) as client:
            await client.request(1, "Version", grpc_encoding="gzip")
            assert (await client.answer())["grpc-accept-encoding"] == "identity"
            await client.request(3, "Version", struct.pack("!BI", 1, 0))
            answer = await client.answer()
            assert (answer["grpc-status"], "compressed" in answer["grpc-message"]) == ("12", True)


@pytest.mark.parametrize("data", [None, b"\0\0", struct.pack("!BI", 0, 50) + b"abc"])
async def test_a_request_that_ends_early_is_refused(data: bytes | None) -> None:
    async with server() as (_, _, path), bare(path) as client:
        await client.request(1, "Version", data)
        assert (await client.answer())["grpc-status"] == "3"


async def test_a_message_of_five_bytes_is_no_prefix() -> None:
    async with server() as (_, _, path), bare(path) as client:
        await client.request(1, "StartContainer", struct.pack("!BI", 0, 5) + b"\x0a\x03abc")
        assert (await client.answer())["grpc-status"] == "0"


async def test_a_bad_timeout_and_odd_frames_do_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    async with server() as (_, _, path), bare(path) as client:
        await client.request(1, "Version", grpc_timeout="soon")
        assert (await client.answer())["grpc-status"] == "3"
        grease = b"\0\0\6" + b"\xbb\0" + b"\0" * 4 + b"grease"  # length, type and flags, stream
        await asyncio.get_running_loop().sock_sendall(client.sock, grease)
        await client.request(3, "Version")
        assert (await client.answer())["grpc-status"] == "0"
        await client.request(5, "Version\N{SNOWMAN}")
        with pytest.raises(EOFError):
            await client.answer()
    assert [record.name for record in caplog.records] == ["hyperpod.rpc.connection"], "no traceback"


# -- limits ------------------------------------------------------------------------------------------------


async def test_more_than_a_hundred_calls_do_not_starve_the_next() -> None:
    async with server() as (service, _, path):
        async with bare(path) as client:
            await client.setting(SettingCodes.MAX_CONCURRENT_STREAMS, MAX_STREAMS)
        async with channel(path) as made:
            slow = [asyncio.ensure_future(call(made, "StopContainer")) for _ in range(300)]
            await until_running(service, 300)
            assert b"0.1.0" in await call(made, "Version")
            service.go.set()
            await asyncio.gather(*slow)


async def test_requests_over_the_limit_are_refused_before_they_are_kept() -> None:
    async with server() as (_, _, path), channel(path, max_send_message_length=-1) as made:
        status, text = await code(made, "Version", b"\0" * (MESSAGE_LIMIT + 1))
        assert status == "RESOURCE_EXHAUSTED"
        assert str(MESSAGE_LIMIT) in text
        assert b"0.1.0" in await call(made, "Version")


# -- clients that leave ------------------------------------------------------------------------------------


async def test_a_client_that_vanishes_while_writing_is_paused_leaks_nothing() -> None:
    async with server() as (service, rpc, path):
        service.big = "x" * (12 * 1024 * 1024)
        async with bare(path) as client:
            await client.request(1, "Version")
            await service.called.wait()
            while all(protocol.connection.write_ready.is_set() for protocol in rpc._server.life.protocols):
                await asyncio.sleep(0.01)
            await client.reset(1)
            await asyncio.sleep(0.05)
            assert rpc.running() == 1, "the call waits to write its status"
        await until_idle(rpc)


async def test_clean_up_is_not_cancelled_again_when_the_client_leaves() -> None:
    async with server() as (service, rpc, path):
        async with bare(path) as client:
            await client.request(1, "RemoveContainer", grpc_timeout="1S")
            await until_running(service, 1)
            while service.running:
                await asyncio.sleep(0.01)
            await client.reset(1)
        await until_idle(rpc)
        assert service.cleaned == 1
        async with bare(path) as client:
            await client.request(1, "RemoveContainer")
            await until_running(service, 1)
            await client.reset(1)
            await client.request(3, "Version")
            await client.answer()
        await until_idle(rpc)
        assert service.cleaned == 2


async def test_a_deadline_ends_the_call() -> None:
    async with server() as (service, rpc, path), bare(path) as client:
        await client.request(1, "StopContainer", grpc_timeout="50m")
        assert (await client.answer())["grpc-status"] == "4"
        await until_idle(rpc)
        assert service.running == 0


# -- the end -----------------------------------------------------------------------------------------------


async def test_close_announces_itself_and_drains() -> None:
    async with server() as (service, rpc, path), bare(path) as client:
        await client.request(1, "StopContainer")
        await until_running(service, 1)
        closing = asyncio.ensure_future(rpc.close(20))
        while path.exists():
            await asyncio.sleep(0.01)
        await client.request(3, "Version")
        await asyncio.sleep(0.05)
        assert not closing.done()
        service.go.set()
        await closing
        frames = await client.frames()
        goaways = [frame.last_stream_id for frame in frames if isinstance(frame, GoAwayFrame)]
        assert goaways == [LAST_STREAM, 3]
        decoder = hpack.Decoder()
        ends = [
            (frame.stream_id, value)
            for frame in frames
            if isinstance(frame, HeadersFrame)
            for name, value in decoder.decode(frame.data, raw=True)
            if name == b"grpc-status"
        ]
        assert sorted(ends) == [(1, b"0"), (3, b"14")], "the running call ends well, the new one is refused"


async def test_close_tells_those_that_do_not_end() -> None:
    async with server() as (service, rpc, path), channel(path) as made:
        stuck = asyncio.ensure_future(code(made, "RemoveContainer"))
        await until_running(service, 1)
        await rpc.close(0.1)
        assert await stuck == ("UNAVAILABLE", "the runtime is shutting down; try again")
        assert service.cleaned == 1


# -- the socket and the log --------------------------------------------------------------------------------


async def test_a_live_socket_is_not_stolen_and_a_stale_one_is_replaced() -> None:
    async with server() as (_, _, path):
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(FailedPrecondition, match="listens on"):
            await RpcServer([Service()]).listen(path)
        stale = path.with_name("stale")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(stale))
        rpc = RpcServer([Service()])
        await rpc.listen(stale)
        assert sorted(os.listdir(path.parent)) == ["s", "stale"]
        await rpc.close(1)


async def test_other_users_are_refused_even_when_the_mode_lets_them() -> None:
    program = (
        "import socket, sys\n"
        "sock = socket.socket(socket.AF_UNIX)\n"
        "sock.settimeout(10)\n"
        "sock.connect(sys.argv[1])\n"
        "print(len(sock.recv(100)))\n"
    )

    def bytes_got(uid: int) -> str:
        python = os.path.realpath(sys.executable)  # the environment's folder may be root's alone
        command = [python, "-IS", "-c", program, str(path)]
        done = subprocess.run(command, user=uid, timeout=20, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    async with server() as (_, _, path):
        path.chmod(0o666)
        path.parent.chmod(0o755)
        assert await asyncio.to_thread(bytes_got, 0) != "0"
        assert await asyncio.to_thread(bytes_got, 65534) == "0"


async def test_one_start_and_one_end_line_per_call(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "hyperpod.rpc")
    async with server() as (_, _, path), channel(path) as made:
        await call(made, "Version")
        await call(made, "StartContainer", request("abc"))
        await call(made, "StartContainer", request("a\nforged line"))
        await code(made, "StartContainer", request("missing"))
        await code(made, "StartContainer", request("key"))
    lines = [(r.levelname, r.message.partition("#")) for r in caplog.records if r.name == "hyperpod.rpc"]
    shown = [
        (level, name.strip(), text.partition(" ")[2].rpartition(" in ")[0])
        for level, (name, _, text) in lines
    ]
    assert shown == [
        ("DEBUG", "Version", ""),
        ("DEBUG", "Version", "OK"),
        ("INFO", "StartContainer", ""),
        ("INFO", "StartContainer", "abc: OK"),
        ("INFO", "StartContainer", ""),
        ("INFO", "StartContainer", "a\\nforged line: OK"),
        ("INFO", "StartContainer", ""),
        ("INFO", "StartContainer", "missing: NOT_FOUND (no container 'missing': \\xe2\\x98\\x83 100%)"),
        ("INFO", "StartContainer", ""),
        ("ERROR", "StartContainer", ""),
        ("INFO", "StartContainer", "key: INTERNAL (internal error in StartContainer: KeyError; see the log)"),
    ]
