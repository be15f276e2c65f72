"""Exec and port-forward throughput of host pods, this process as the client: `python -m tests.perf.streams`.

Each end of a stream is a process of its own, and what each of them needs of the CPU is told beside the rate: where
there are fewer CPUs than processes, that is what decides it. A plain asyncio socket relay beside it, in the same
run, says what the machine can do; with --containerd so does containerd, by turns, with the same client. What a
runtime does not manage is told and left out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from grpclib.client import Channel
from wsproto.events import BytesMessage

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.cli.streamclient import SpdyClient, Stream
from hyperpod.errors import Unavailable
from hyperpod.wire.remotecommand import Wanted
from tests.daemonkit import BUSYBOX, ROOT, Cri
from tests.host.conftest import host_daemon_of
from tests.perf import containerd
from tests.perf.report import Figure, number, progress, spread, table
from tests.shimkit import cmdline, processes, until
from tests.streamkit import ALL, OUT, Command, WebSocket, exit_code

PIECE = bytes(32 * 1024)
"""As Go's io.Copy writes."""
FILE_MIB = 64
BUDGET = 150.0
_SINK = ("sh", "-c", "exec cat >/dev/null")
_TICK = os.sysconf("SC_CLK_TCK")


async def figures(megabytes: int, rounds: int) -> list[Figure]:
    [(_, rates)] = await race(megabytes, rounds, with_containerd=False)
    return [
        Figure(
            name, statistics.median(found.values), "MiB/s", None if "plain" in name else BUDGET, at_least=True,
            note=f"{rounds} x {megabytes} MiB: {spread(found.values)}; CPU ms for a MiB, user+system: "
            + found.where(megabytes),
        )
        for name, found in rates.items()
    ]  # fmt: skip


async def race(megabytes: int, rounds: int, *, with_containerd: bool) -> list[tuple[str, dict[str, _Rates]]]:
    """By name of the runtime: what each way gave, by turns."""
    size = megabytes << 20
    async with contextlib.AsyncExitStack() as stack:
        one = stack.enter_context(host_daemon_of('host_pods = ["test"]\n---', log_level="info"))
        client = await stack.enter_async_context(one.client())
        client.handler = "host"
        await client.load_busybox()
        source, source_pid = await stack.enter_async_context(_peer("source", str(size)))
        sink, sink_pid = await stack.enter_async_context(_peer("sink"))
        relay, relay_pid = await stack.enter_async_context(_peer("relay", str(source)))
        pids = {"source": source_pid, "sink": sink_pid, "relay": relay_pid}
        ours = await _Pod.make("hyperpod", client, str(one.run_dir), one.pid(), pids)
        pods = [ours]
        if with_containerd:
            peer = stack.enter_context(containerd.running(None, one.base / "busybox"))
            channel = Channel(path=str(peer.socket))
            stack.callback(channel.close)
            other = Cri(one, channel)
            pods.append(await _Pod.make(peer.version, other, peer.marker, peer.pid, pids))
        rates: list[tuple[str, dict[str, _Rates]]] = [(pod.name, {}) for pod in pods]
        for _ in range(rounds):
            for pod, (_, found) in zip(pods, rates, strict=True):
                await pod.round(size, source, sink, found)
                if pod is ours:
                    await pod.measure("plain asyncio relay", lambda: _plain(relay, size), size, found)
        for pod in pods:
            await pod.client.remove_pod(pod.pod)
    return rates


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

    def where(self, megabytes: int) -> str:
        """Milliseconds for one MiB; who needed next to nothing is left out."""
        per = 1000 / (len(self.values) * megabytes)
        return ", ".join(
            f"{name} {number(user * per)}+{number(system * per)}"
            for name, (user, system) in self.cpu.items()
            if (user + system) * per >= 0.01
        )


@dataclass
class _Pod:
    """One runtime's, on the host's network, with a container that sleeps. `cgroup`: of the container."""

    name: str
    client: Cri
    pod: str
    container: str
    pids: dict[str, int]
    cgroup: Path

    @classmethod
    async def make(cls, name: str, client: Cri, marker: str, server: int, pids: dict[str, int]) -> _Pod:
        """`marker`: in the command line of each process of the runtime's pods."""
        options = cri.NamespaceOption(network=cri.NamespaceMode.NODE, pid=cri.NamespaceMode.CONTAINER)
        context = cri.LinuxSandboxSecurityContext(namespace_options=options)
        config = client.pod_config(security_context=context)
        config.hostname = ""  # on the host's network it has the host's
        pod = await client.run_pod(config)
        seconds = str(secrets.randbelow(10**8) + 10**8)
        request = cri.CreateContainerRequest(
            pod_sandbox_id=pod, sandbox_config=config,
            config=cri.ContainerConfig(
                metadata=cri.ContainerMetadata(name="c"), image=cri.ImageSpec(image=BUSYBOX),
                command=["sleep", seconds], log_path="c.log",
                linux=cri.LinuxContainerConfig(
                    security_context=cri.LinuxContainerSecurityContext(namespace_options=options)
                ),
            ),
        )  # fmt: skip
        container = (await client.runtime.create_container(request)).container_id
        await client.start(container)
        until(lambda: _having(seconds))  # it was crun until it became the program
        [sleeper] = _having(seconds)
        groups = Path(f"/proc/{sleeper}/cgroup").read_text().splitlines()
        path = next(line.split(":", 2) for line in groups if "cpuacct" in line or line.startswith("0::"))
        mounted = Path("/sys/fs/cgroup/cpuacct" if path[1] else "/sys/fs/cgroup")
        own = {pid: cmdline(pid) for pid in processes() if marker.encode() in cmdline(pid)}
        found = {
            "shim": _one(pid for pid, line in own.items() if b"shim" in line.split(b"\0")[0]),
            "agent": next((pid for pid, line in own.items() if line.startswith(b"hyperpod-agent")), 0),
            "runtime": server,
        }
        made = cls(name, client, pod, container, found | pids, mounted / path[2].lstrip("/"))
        await made._make_file()
        return made

    async def exec_url(self, *argv: str, wanted: Wanted = OUT) -> str:
        request = cri.ExecRequest(
            container_id=self.container, cmd=list(argv),
            stdin=wanted.stdin, stdout=wanted.stdout, stderr=wanted.stderr,
        )  # fmt: skip
        return (await self.client.runtime.exec(request)).url

    async def _make_file(self) -> None:
        argv = ("dd", "if=/dev/zero", "of=/tmp/file", "bs=1024k", f"count={FILE_MIB}")
        assert exit_code((await (await Command.open(await self.exec_url(*argv))).result())[2]) == 0

    async def round(self, size: int, source: int, sink: int, rates: dict[str, _Rates]) -> None:
        runs: dict[str, Callable[[], Awaitable[None]]] = {
            "exec down, SPDY": lambda: self.spdy_down(size), "exec up, SPDY": lambda: self.spdy_up(size),
            "exec down, WebSocket": lambda: self.web_down(size),
            "exec up, WebSocket": lambda: self.web_up(size),
            "port-forward down": lambda: self.forward_down(source, size),
            "port-forward up": lambda: self.forward_up(sink, size),
        }  # fmt: skip
        for name, run in runs.items():
            await self.measure(name, run, size, rates)

    async def measure(
        self, name: str, run: Callable[[], Awaitable[None]], size: int, rates: dict[str, _Rates]
    ) -> None:
        before, start = self._cpu(), time.monotonic()
        try:
            await run()
        except Unavailable as exc:
            progress(f"{self.name}: {name}: {exc}")
            return
        rate = size / (1 << 20) / (time.monotonic() - start)
        after = self._cpu()
        spent = {
            who: (after[who][0] - user, after[who][1] - system) for who, (user, system) in before.items()
        }
        rates.setdefault(name, _Rates()).add(rate, spent)
        progress(f"{self.name}: {name}: {rate:.0f} MiB/s")

    def _cpu(self) -> dict[str, tuple[float, float]]:
        """Seconds (user, system) so far: this process, those in `pids`, and all that ran in the container."""
        own = os.times()
        found = {"client": (own.user, own.system)}
        for name, pid in self.pids.items():
            if pid:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                found[name] = int(fields[11]) / _TICK, int(fields[12]) / _TICK
        return found | {"container": self._container_cpu()}

    def _container_cpu(self) -> tuple[float, float]:
        if (self.cgroup / "cpuacct.usage_user").exists():
            user, system = ((self.cgroup / f"cpuacct.usage_{kind}").read_text() for kind in ("user", "sys"))
            return int(user) / 1e9, int(system) / 1e9
        values = dict(line.split() for line in (self.cgroup / "cpu.stat").read_text().splitlines())
        return int(values["user_usec"]) / 1e6, int(values["system_usec"]) / 1e6

    def _cat(self, size: int) -> list[str]:
        return ["cat", *["/tmp/file"] * (size // (FILE_MIB << 20))]

    async def spdy_down(self, size: int) -> None:
        command = await Command.open(await self.exec_url(*self._cat(size)))
        assert await _count(command.stdout.read) == size  # type: ignore[union-attr]
        await command.client.close()

    async def spdy_up(self, size: int) -> None:
        command = await Command.open(await self.exec_url(*_SINK, wanted=ALL), ALL)
        for _ in range(size // len(PIECE)):
            await command.write(PIECE)
        await command.end()
        assert exit_code((await command.result())[2]) == 0

    async def web_down(self, size: int) -> None:
        socket, got = await WebSocket.connect(await self.exec_url(*self._cat(size)), "v5.channel.k8s.io"), 0
        async for message in socket.messages():
            got += len(message) - 1 if message[:1] == b"\x01" else 0
        assert got == size
        socket.close()

    async def web_up(self, size: int) -> None:
        socket = await WebSocket.connect(await self.exec_url(*_SINK, wanted=ALL), "v5.channel.k8s.io")
        # Masked once: the client's cost is not ours.
        frame = socket._connection.send(BytesMessage(b"\0" + PIECE))
        for _ in range(size // len(PIECE)):
            await socket._loop.sock_sendall(socket._sock, frame)
        await socket.send(b"\xff\x00")
        assert b"Success" in (await socket.channels())[3]
        socket.close()

    async def forward_down(self, port: int, size: int) -> None:
        client, stream = await self._forwarded(port)
        assert await _count(stream.read) == size
        await client.close()

    async def forward_up(self, port: int, size: int) -> None:
        client, stream = await self._forwarded(port)
        for _ in range(size // len(PIECE)):
            await stream.write(PIECE)
        await stream.end()
        answer = await stream.read_all()
        if not answer:
            raise Unavailable("the port's answer to the end of input did not come")
        assert int(answer) == size
        await client.close()

    async def _forwarded(self, port: int) -> tuple[SpdyClient, Stream]:
        request = cri.PortForwardRequest(pod_sandbox_id=self.pod, port=[port])
        url = (await self.client.runtime.port_forward(request)).url
        client = await SpdyClient.connect(url, "portforward.k8s.io")
        headers = (("port", str(port)), ("requestid", "0"))
        await client.open((("streamtype", "error"), *headers))
        return client, await client.open((("streamtype", "data"), *headers))


async def _plain(port: int, size: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    assert await _count(lambda: reader.read(1 << 18)) == size
    writer.close()


def _having(word: str) -> list[int]:
    return [pid for pid in processes() if word.encode() in cmdline(pid).split(b"\0")]


def _one(found: Iterable[int]) -> int:
    [pid] = found
    return pid


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
        cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield int(await process.stdout.readline()), process.pid
    finally:
        await process.communicate(b"")


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.perf.streams", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=512, help=f"of one stream, a multiple of {FILE_MIB}")
    parser.add_argument("--containerd", action="store_true", help="run Debian's containerd and runc, too")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    found = asyncio.run(race(args.megabytes, args.rounds, with_containerd=args.containerd))
    print(f"{os.cpu_count()} CPUs, load {load:.1f} before the run\n")
    for name, rates in found:
        rows = [[way, spread(one.values), one.where(args.megabytes)] for way, one in rates.items()]
        print(table((name, "MiB/s", "CPU ms for a MiB, user+system"), rows), end="\n\n")


if __name__ == "__main__":
    main()
