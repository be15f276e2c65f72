"""Exec and port-forward throughput: host agent, real crun, real shim, this process as the client.

Each end of a stream is a process of its own, and what each of them needs of the CPU is told beside the rate: where
there are fewer CPUs than processes, that is what decides it. A plain asyncio socket relay beside it, in the same
run, says what the machine can do.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from wsproto.events import BytesMessage

from hyperpod.cli.streamclient import SpdyClient, Stream
from hyperpod.config import StreamingConfig
from tests.agentkit import REPOSITORY, AgentKit, agent_folder, agent_pid, host_agent, make_busybox_layer
from tests.perf.report import Figure, number, progress, spread
from tests.streamkit import ALL, OUT, Command, StreamPod, WebSocket, exit_code, stream_pod

PIECE = bytes(32 * 1024)
"""As Go's io.Copy writes."""
FILE_MIB = 64
_SINK = ("sh", "-c", "exec cat >/dev/null")
_TICK = os.sysconf("SC_CLK_TCK")


async def figures(megabytes: int, rounds: int) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="hp-perf-") as folder:
        base = Path(folder)
        async with host_agent(base, make_busybox_layer(base)) as place:
            kit = await AgentKit.claim(place)
            try:
                async with stream_pod(kit, StreamingConfig()) as pod:
                    return await _Runs(pod, base, megabytes << 20).all(rounds)
            finally:
                await kit.client.close()


@dataclass
class _Rates:
    """Of one way: each round's MiB/s, and the CPU time of each process, (user, system) in seconds."""

    values: list[float] = field(default_factory=list)
    cpu: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, rate: float, cpu: dict[str, tuple[float, float]]) -> None:
        self.values.append(rate)
        for name, (user, system) in cpu.items():
            before = self.cpu.get(name, (0.0, 0.0))
            self.cpu[name] = before[0] + user, before[1] + system

    def where(self, size: int) -> str:
        """Milliseconds for one MiB; who needed next to nothing is left out."""
        per = 1000 / (len(self.values) * size / (1 << 20))
        return ", ".join(
            f"{name} {number(user * per)}+{number(system * per)}"
            for name, (user, system) in self.cpu.items()
            if (user + system) * per >= 0.01
        )


class _Runs:
    def __init__(self, pod: StreamPod, base: Path, size: int) -> None:
        self.pod, self.size = pod, size
        self.container = ""
        self.pids: dict[str, int] = {}
        self.cgroup = f"/hyperpod/{agent_folder(base).name}"

    async def all(self, rounds: int) -> list[Figure]:
        pod = self.pod
        self.container = await pod.run("sleep", "10000")
        await self._make_file()
        shim = (await pod.shim.hello()).pid
        async with (
            _peer("source", str(self.size)) as (source, source_pid),
            _peer("sink") as (sink, sink_pid),
            _peer("relay", str(source)) as (relay, relay_pid),
        ):
            self.pids = {"shim": shim, "agent": agent_pid(pod.agent.place), "source": source_pid,
                         "sink": sink_pid, "relay": relay_pid}  # fmt: skip
            runs: dict[str, Callable[[], Awaitable[None]]] = {
                "exec down, SPDY": self.spdy_down, "exec up, SPDY": self.spdy_up,
                "exec down, WebSocket": self.web_down, "exec up, WebSocket": self.web_up,
                "port-forward down": lambda: self.forward_down(source),
                "port-forward up": lambda: self.forward_up(sink),
                "plain asyncio relay": lambda: self.plain(relay),
            }  # fmt: skip
            rates = {name: _Rates() for name in runs}
            for _ in range(rounds):
                for name, run in runs.items():
                    before, start = self._cpu(), time.monotonic()
                    await run()
                    rate = self.size / (1 << 20) / (time.monotonic() - start)
                    after = self._cpu()
                    spent = {who: (after[who][0] - u, after[who][1] - s) for who, (u, s) in before.items()}
                    rates[name].add(rate, spent)
                    progress(f"{name}: {rate:.0f} MiB/s")
        return [
            Figure(
                name, statistics.median(found.values), "MiB/s", None if "plain" in name else 150.0,
                at_least=True,
                note=f"{rounds} x {self.size >> 20} MiB: {spread(found.values)}; CPU ms for a MiB, user+system: "
                + found.where(self.size),
            )
            for name, found in rates.items()
        ]  # fmt: skip

    async def _make_file(self) -> None:
        command = await Command.open(
            self.pod.exec_url(
                self.container, "dd", "if=/dev/zero", "of=/tmp/file", "bs=1024k", f"count={FILE_MIB}"
            )
        )
        assert exit_code((await command.result())[2]) == 0

    def _cpu(self) -> dict[str, tuple[float, float]]:
        """Seconds (user, system) so far: this process, those in `pids`, and all that ran in the container."""
        own = os.times()
        found = {"client": (own.user, own.system)}
        for name, pid in self.pids.items():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[name] = int(fields[11]) / _TICK, int(fields[12]) / _TICK
        return found | {"container": self._container_cpu()}

    def _container_cpu(self) -> tuple[float, float]:
        v1 = Path(f"/sys/fs/cgroup/cpuacct{self.cgroup}")
        if v1.exists():
            user, system = ((v1 / f"cpuacct.usage_{kind}").read_text() for kind in ("user", "sys"))
            return int(user) / 1e9, int(system) / 1e9
        lines = Path(f"/sys/fs/cgroup{self.cgroup}/cpu.stat").read_text().splitlines()
        values = dict(line.split() for line in lines)
        return int(values["user_usec"]) / 1e6, int(values["system_usec"]) / 1e6

    def _cat(self) -> str:
        files = ["/tmp/file"] * (self.size // (FILE_MIB << 20))
        return self.pod.exec_url(self.container, "cat", *files, wanted=OUT)

    async def spdy_down(self) -> None:
        command = await Command.open(self._cat())
        assert await _count(command.stdout.read) == self.size  # type: ignore[union-attr]
        await command.client.close()

    async def spdy_up(self) -> None:
        command = await Command.open(self.pod.exec_url(self.container, *_SINK, wanted=ALL), ALL)
        for _ in range(self.size // len(PIECE)):
            await command.write(PIECE)
        await command.end()
        assert exit_code((await command.result())[2]) == 0

    async def web_down(self) -> None:
        socket, got = await WebSocket.connect(self._cat(), "v5.channel.k8s.io"), 0
        async for message in socket.messages():
            got += len(message) - 1 if message[:1] == b"\x01" else 0
        assert got == self.size
        socket.close()

    async def web_up(self) -> None:
        url = self.pod.exec_url(self.container, *_SINK, wanted=ALL)
        socket = await WebSocket.connect(url, "v5.channel.k8s.io")
        # Masked once: the client's cost is not ours.
        frame = socket._connection.send(BytesMessage(b"\0" + PIECE))
        for _ in range(self.size // len(PIECE)):
            await socket._loop.sock_sendall(socket._sock, frame)
        await socket.send(b"\xff\x00")
        assert b"Success" in (await socket.channels())[3]
        socket.close()

    async def forward_down(self, port: int) -> None:
        client, stream = await self._forwarded(port)
        assert await _count(stream.read) == self.size
        await client.close()

    async def forward_up(self, port: int) -> None:
        client, stream = await self._forwarded(port)
        for _ in range(self.size // len(PIECE)):
            await stream.write(PIECE)
        await stream.end()
        assert int(await stream.read_all()) == self.size
        await client.close()

    async def _forwarded(self, port: int) -> tuple[SpdyClient, Stream]:
        client = await SpdyClient.connect(self.pod.forward_url(), "portforward.k8s.io")
        headers = (("port", str(port)), ("requestid", "0"))
        await client.open((("streamtype", "error"), *headers))
        return client, await client.open((("streamtype", "data"), *headers))

    async def plain(self, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        assert await _count(lambda: reader.read(1 << 18)) == self.size
        writer.close()


async def _count(read: Callable[[], Awaitable[bytes]]) -> int:
    total = 0
    while data := await read():
        total += len(data)
    return total


@asynccontextmanager
async def _peer(*args: str) -> AsyncIterator[tuple[int, int]]:
    """Port and pid."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.perf.peer", *args,
        cwd=REPOSITORY, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield int(await process.stdout.readline()), process.pid
    finally:
        await process.communicate(b"")
