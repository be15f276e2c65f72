"""An agent to test against, over whatever transport; here as a host process, from tests/vm in a VM.

`AgentPlace` is all that a transport gives; the tests in tests/component/test_agent_*.py use nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hyperpod.agentclient.client import AgentClient
from hyperpod.agentclient.types import ContainerInfo, ImageVolume, Layer, Security
from hyperpod.errors import ProtocolError, Unavailable
from hyperpod.spec.oci import ContainerSpecInput, build_process, build_spec
from hyperpod.vsock.dial import Endpoint, HostEndpoint
from hyperpod.vsock.open import STDIO_PORT, open_agent
from hyperpod.wire.stdio import Open
from hyperpod.wire.stdioends import HostReader, StdinSender
from images import envexec

REPOSITORY = Path(__file__).parent.parent
TIMEOUT = 180.0
"""Seconds for anything in these tests; an emulated guest on a loaded host is slow."""

APPLETS = (
    *("sh", "grep", "pwd", "cat", "echo", "sleep", "ls", "id", "ps", "kill", "yes", "head", "dd", "true"),
    *(
        "false",
        "env",
        "mount",
        "tr",
        "wc",
        "stty",
        "seq",
        "test",
        "printf",
        "mkdir",
        "date",
        "chmod",
        "rm",
        "touch",
        "hostname",
        "df",
        "tail",
        "mknod",
        "readlink",
    ),
)


LINKS = (
    ("up", "../../../../../../../bin"),
    ("absolute", "/bin"),
    ("proc", "/proc/self/root"),
    ("loop", "loop"),
)
"""In the image's /etc: what would lead out of it."""


@dataclass(frozen=True)
class AgentPlace:
    """A running, unclaimed agent. `layers`: a busybox root, topmost last. `memory_limits`: OOM can be tested."""

    endpoint: Endpoint
    sandbox_id: str
    token: bytes
    layers: tuple[Layer, ...]
    memory_limits: bool
    stdio_resumable: bool = True


def make_busybox_layer(directory: Path) -> Path:
    """A squashfs image of a root with Debian's static busybox."""
    root = directory / "root"
    for name in ("bin", "proc", "dev", "sys", "tmp", "etc"):
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    (root / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (root / "bin/busybox").chmod(0o755)
    for applet in APPLETS:
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/notes").write_text("not a program\n")
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nbob:x:1000:1001::/home/bob:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nbob:x:1001:\nteam:x:50000:bob\n")
    for name, target in LINKS:
        (root / "etc" / name).symlink_to(target)
    subprocess.run(
        ["gcc", "-static", "-O1", "-o", root / "bin/probe", REPOSITORY / "tests/probe.c"], check=True
    )
    image = directory / "busybox.sqfs"
    subprocess.run(
        ["mksquashfs", root, image, "-quiet", "-no-progress", "-all-root", "-comp", "gzip"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return image


def agent_folder(directory: Path) -> Path:
    """Where `host_agent` runs. Its name is its cgroup's too, and those are the whole host's."""
    return directory / f"a{hashlib.sha256(bytes(directory)).hexdigest()[:10]}"


@asynccontextmanager
async def host_agent(directory: Path, image: Path) -> AsyncIterator[AgentPlace]:
    """A host agent in `directory`; ends by SIGTERM, and must do so in time and with code 0."""
    state = agent_folder(directory)
    process = subprocess.Popen(
        [sys.executable, "-m", "hyperpod.agent.main", "--host", str(state)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HYPERPOD_ENVEXEC": str(envexec.build())},
        stdin=subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(TIMEOUT):
            while not (state / "1024.sock").exists():
                assert process.poll() is None, "the agent ended at its start"
                await asyncio.sleep(0.02)
        yield AgentPlace(
            HostEndpoint(str(state)),
            secrets.token_hex(32),
            secrets.token_bytes(32),
            (Layer(serial="busybox", path=str(image), fstype="squashfs"),),
            memory_limits=not Path("/sys/fs/cgroup/cgroup.controllers").exists()
            or "memory" in Path("/sys/fs/cgroup/cgroup.controllers").read_text(),
        )
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            code = await asyncio.to_thread(process.wait, TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
    assert code == 0, f"the agent ended with {code}"


def agent_pid(place: AgentPlace) -> int:
    """Of a host agent."""
    assert isinstance(place.endpoint, HostEndpoint)
    folder = place.endpoint.directory.encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if (entry / "cmdline").read_bytes().split(b"\0")[-2:-1] == [folder]:
                    return int(entry.name)
    raise AssertionError("the agent is not running")


def processes_with(text: str) -> list[int]:
    """Pids of all processes that have it in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if text.encode() in command and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


class AgentKit:
    """Short words for the tests: a claimed agent with its client."""

    def __init__(self, place: AgentPlace, client: AgentClient) -> None:
        self.place, self.client = place, client

    @classmethod
    async def claim(cls, place: AgentPlace) -> AgentKit:
        client = AgentClient(place.endpoint, place.sandbox_id, place.token)
        try:
            await client.connect(claim=True, timeout=TIMEOUT)
            await client.hello(host_time_ns=0, entropy=os.urandom(16), hostname="", sysctls={})
        except BaseException:
            await client.close()  # else it is a failure of whichever test runs when it is collected
            raise
        return cls(place, client)

    async def another_client(self) -> AgentClient:
        client = AgentClient(self.place.endpoint, self.place.sandbox_id, self.place.token)
        await client.connect(claim=False, timeout=TIMEOUT)
        return client

    async def create(
        self,
        *args: str,
        spec: ContainerSpecInput | None = None,
        stdin: bool = False,
        stdin_once: bool = False,
        security: Security | None = None,
        image_volumes: Sequence[ImageVolume] = (),
    ) -> str:
        """A created container that runs `args`."""
        ident = secrets.token_hex(32)
        base = spec or ContainerSpecInput(args=args)
        full = replace(base, args=base.args or args, env=base.env or (b"PATH=/bin",))
        await self.client.create_container(
            ident,
            oci_spec=build_spec(full),
            layers=self.place.layers,
            tty=full.tty,
            stdin=stdin,
            stdin_once=stdin_once,
            security=security,
            image_volumes=image_volumes,
        )
        return ident

    async def run(
        self, *args: str, spec: ContainerSpecInput | None = None, security: Security | None = None
    ) -> tuple[str, ContainerInfo, bytes]:
        """Run to the end: id, how it ended, and its stdout."""
        ident = await self.create(*args, spec=spec, security=security)
        await self.client.start_container(ident)
        async with self.output(ident) as stream:
            out = await stream.read_all()
        return ident, await self.exit_of(ident), out

    async def start(
        self,
        *args: str,
        spec: ContainerSpecInput | None = None,
        security: Security | None = None,
        **options: Any,
    ) -> str:
        ident = await self.create(*args, spec=spec, security=security, **options)
        await self.client.start_container(ident)
        return ident

    async def exit_of(self, ident: str) -> ContainerInfo:
        """Wait for the exit event of a container."""
        async with asyncio.timeout(TIMEOUT):
            async for event in self.client.events(0):
                if event.exited.id == ident:
                    return event.exited
        raise AssertionError("the events ended")

    async def exec(
        self,
        ident: str,
        *args: str,
        tty: bool = False,
        stdin: bool = False,
        env: tuple[bytes, ...] = (b"PATH=/bin",),
    ) -> str:
        """A started exec's id."""
        exec_id = secrets.token_hex(16)
        process = build_process(ContainerSpecInput(args=args, env=env, tty=tty))
        await self.client.start_exec(ident, exec_id, process_json=process, tty=tty, stdin=stdin)
        return exec_id

    @asynccontextmanager
    async def output(
        self, container: str, exec_id: str = "", stream: str = "stdout", from_offset: int = 0
    ) -> AsyncIterator[OutputConnection]:
        sock, rest = await open_agent(
            self.place.endpoint, STDIO_PORT, self.place.sandbox_id, self.place.token, timeout=TIMEOUT
        )
        reader, writer = await asyncio.open_connection(sock=sock)
        connection = OutputConnection(reader, writer, Open(container, stream, exec_id, from_offset), rest)
        try:
            yield connection
        finally:
            writer.close()

    @asynccontextmanager
    async def input(self, container: str, exec_id: str = "") -> AsyncIterator[InputConnection]:
        sock, _ = await open_agent(
            self.place.endpoint, STDIO_PORT, self.place.sandbox_id, self.place.token, timeout=TIMEOUT
        )
        reader, writer = await asyncio.open_connection(sock=sock)
        connection = InputConnection(reader, writer, Open(container, "stdin", exec_id))
        try:
            await connection.opened()
            yield connection
        finally:
            writer.close()


class OutputConnection:
    """Reads one output stream; acknowledges unless told not to."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, what: Open, rest: bytes
    ) -> None:
        self._reader, self._writer, self._rest = reader, writer, rest
        self.protocol = HostReader(what)
        writer.write(self.protocol.start())

    async def chunk(self, *, ack: bool = True) -> bytes:
        """The next bytes, b"" at EOF. Raises StreamRefused, Unavailable when cut."""
        async with asyncio.timeout(TIMEOUT):
            while not self.protocol.eof:
                data = self._rest or await self._reader.read(65536)
                self._rest = b""
                if not data:
                    raise Unavailable("the stdio connection was cut")
                got = b"".join(bytes(frame.payload) for frame in self.protocol.feed(data))
                if ack and self.protocol.offset > self.protocol.acked:
                    self._writer.write(self.protocol.ack(self.protocol.offset))
                    await self._writer.drain()
                if got:
                    return got
        return b""

    async def opened(self) -> None:
        """Until the agent has answered OPENED."""
        async with asyncio.timeout(TIMEOUT):
            while not self.protocol.opened:
                data = await self._reader.read(20)
                if not data:
                    raise Unavailable("the stdio connection was cut")
                assert not self.protocol.feed(data)

    async def read_exactly(self, count: int, *, ack: bool = True) -> bytes:
        """At least `count` bytes."""
        got = bytearray()
        while len(got) < count and (part := await self.chunk(ack=ack)):
            got += part
        return bytes(got)

    async def read_until(self, text: bytes) -> bytes:
        got = bytearray()
        while text not in got and (part := await self.chunk()):
            got += part
        return bytes(got)

    async def read_all(self) -> bytes:
        """Everything to EOF."""
        got = bytearray()
        while part := await self.chunk():
            got += part
        return bytes(got)

    async def refused(self) -> str:
        """The reason with which the agent ends this connection."""
        try:
            while await self.chunk():
                pass
        except ProtocolError as exc:
            return str(exc)
        raise AssertionError("not refused")


class InputConnection:
    """Writes one stdin."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, what: Open) -> None:
        self._reader, self._writer = reader, writer
        self.protocol = StdinSender(what)
        writer.write(self.protocol.start())

    async def opened(self) -> None:
        while not self.protocol.opened:
            await self._feed()

    async def _feed(self) -> None:
        async with asyncio.timeout(TIMEOUT):
            data = await self._reader.read(65536)
        if not data:
            raise Unavailable("the stdio connection was cut")
        self.protocol.feed(data)

    async def write(self, data: bytes) -> None:
        """All of it, and until all is acknowledged."""
        at = 0
        while at < len(data):
            part = data[at : at + self.protocol.room]
            self._writer.writelines(self.protocol.data(part))
            at += len(part)
            while self.protocol.acked < self.protocol.offset:
                await self._feed()

    def eof(self) -> None:
        self._writer.write(self.protocol.finish())
