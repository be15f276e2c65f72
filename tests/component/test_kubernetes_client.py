"""The official Kubernetes client for Python against our streaming server: exec, attach and port-forward."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from kubernetes.client import Configuration
from kubernetes.stream.ws_client import PortForward, WSClient, create_websocket

from hyperpod.config import StreamingConfig
from tests.agentkit import TIMEOUT, AgentKit
from tests.component.test_portforward import echo, listening
from tests.streamkit import ALL, OUT, TTY, StreamPod, stream_pod

V5, V4, BASE = "v5.channel.k8s.io", "v4.channel.k8s.io", "channel.k8s.io"


@pytest.fixture
async def pod(agent: AgentKit) -> AsyncIterator[StreamPod]:
    async with stream_pod(agent, StreamingConfig()) as made:
        yield made


@contextmanager
def client(url: str, protocol: str = "", *, binary: bool = False) -> Iterator[Any]:
    """Blocking: to be used in a thread."""
    headers = {"sec-websocket-protocol": protocol} if protocol else {}
    made = WSClient(Configuration(), url.replace("http://", "ws://"), headers, True, binary=binary)
    try:
        yield made
    finally:
        made.sock.shutdown()


@pytest.mark.parametrize("protocol", ["", V5, V4])
async def test_exec(pod: StreamPod, protocol: str) -> None:
    container = await pod.run("sleep", "1000")
    url = pod.exec_url(container, "sh", "-c", "echo out; echo err >&2; exit 7", wanted=OUT)

    def run() -> tuple[str, str, str, int]:
        with client(url, protocol) as made:
            made.run_forever(timeout=TIMEOUT)
            return made.subprotocol, made.read_stdout(), made.read_stderr(), made.returncode

    assert await asyncio.to_thread(run) == (protocol or V5, "out\n", "err\n", 7)


async def test_input_and_its_end(pod: StreamPod) -> None:
    container = await pod.run("sleep", "1000")
    url = pod.exec_url(container, "cat", wanted=ALL)
    data = bytes(range(256)) * 4000

    def run() -> tuple[bytes, int]:
        out = b""
        with client(url, V5, binary=True) as made:
            for start in range(0, len(data), 64_000):
                made.write_stdin(data[start : start + 64_000])
                out += made.read_stdout(timeout=0)
            made.close_channel(0)
            made.run_forever(timeout=TIMEOUT)
            return out + made.read_stdout(), made.returncode

    assert await asyncio.to_thread(run) == (data, 0)


async def test_terminal(pod: StreamPod) -> None:
    container = await pod.run("sleep", "1000")
    url = pod.exec_url(container, "sh", wanted=TTY)

    def run() -> str:
        with client(url, V4) as made:
            made.write_channel(4, '{"Width":120,"Height":40}')
            # Sizes and input come on connections of their own, in any order.
            made.write_stdin("until stty size | grep '^40 120'; do sleep 0.01; done; exit\n")
            made.run_forever(timeout=TIMEOUT)
            assert made.returncode == 0
            out: str = made.read_stdout()
            return out

    assert "\r\n40 120" in await asyncio.to_thread(run)


async def test_attach(pod: StreamPod) -> None:
    container = await pod.run("cat", stdin=True, stdin_once=True)
    url = pod.attach_url(container, ALL)

    def run() -> tuple[str, str, int]:
        with client(url, V5) as made:
            made.write_stdin("hello\n")
            first = made.readline_stdout(timeout=TIMEOUT)
            made.close_channel(0)
            made.run_forever(timeout=TIMEOUT)
            return first, made.read_stdout(), made.returncode

    assert await asyncio.to_thread(run) == ("hello", "", 0)


async def test_port_forward(pod: StreamPod) -> None:
    async with listening(echo) as port:
        url = pod.forward_url(port)
        data = b"0123456789" * 20_000

        def run() -> bytes:
            headers = {"sec-websocket-protocol": V4}
            websocket = create_websocket(Configuration(), url.replace("http://", "ws://"), headers)
            forward, got = PortForward(websocket, [port]), b""
            sock = forward.socket(port)
            sock.settimeout(TIMEOUT)
            sock.sendall(data)
            while len(got) < len(data):
                got += sock.recv(65536)
            assert forward.error(port) is None
            forward.close()
            sock.close()
            while websocket.connected:
                time.sleep(0.01)
            return got

        assert await asyncio.to_thread(run) == data


async def test_old_protocol_tells_in_words(pod: StreamPod) -> None:
    container = await pod.run("sleep", "1000")
    url = pod.exec_url(container, "false")

    def run() -> str:
        with client(url, BASE) as made:
            made.run_forever(timeout=TIMEOUT)
            text: str = made.read_channel(3)
            return text

    assert "exit code: 1" in await asyncio.to_thread(run)
