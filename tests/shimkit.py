"""Real supervisors and shims as processes of their own, in folders of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from hyperpod.shimclient.client import ShimClient
from hyperpod.supervisor.client import ShimProcess, SupervisorClient
from hyperpod.vsock.dial import HostEndpoint
from tests import runs
from tests.stdiopeer import StdioPeer

ROOT = Path(__file__).resolve().parent.parent
IDLE = [sys.executable, "-c", "import signal; signal.pause()"]
"""Stands in the daemon's place where the test itself does what the daemon would."""

WAIT = 60.0
RECORD = re.compile(rb"[0-9T:.-]{29}Z (stdout|stderr) ([FP]) ([^\n]*)\n")


class SupervisorProcess:
    """`supervise` with any command as its daemon."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.log = run_dir, run_dir / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, command: list[str]) -> None:
        code = (
            "import sys; from pathlib import Path; from hyperpod.supervisor.main import supervise\n"
            "sys.exit(supervise(Path(sys.argv[1]), sys.argv[2:], 'debug'))"
        )
        socket = self.run_dir / "supervisor.sock"
        socket.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, self.run_dir, *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        until(lambda: socket.exists() or self.process is None or self.process.poll() is not None)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(WAIT)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def family(self) -> list[int]:
        """Live processes that name the run folder: the supervisor and its shims."""
        return [pid for pid in processes() if str(self.run_dir).encode() in cmdline(pid)]

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[SupervisorClient]:
        client = SupervisorClient(str(self.run_dir / "supervisor.sock"))
        await client.connect(WAIT)
        try:
            yield client
        finally:
            await client.close()


@contextlib.contextmanager
def supervisor(command: list[str] | None = None) -> Iterator[SupervisorProcess]:
    """A started supervisor; neither it nor any of its shims is left afterwards."""
    run_dir = Path(tempfile.mkdtemp(prefix="hp-shimtest-"))
    runs.record("folder", str(run_dir))
    run_dir.chmod(0o711)
    (run_dir / "s").mkdir(mode=0o711)
    one = SupervisorProcess(run_dir)
    try:
        one.start(IDLE if command is None else command)
        yield one
    finally:
        if one.process is not None and one.process.poll() is None:
            one.stop()
        for pid in one.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(run_dir)


class Pod:
    """One sandbox's shim, its peer in the agent's place, and the log files of its containers."""

    def __init__(self, supervisor: SupervisorProcess, client: SupervisorClient, uid: int = 0) -> None:
        self.id, self.token, self.uid = secrets.token_hex(32), secrets.token_bytes(32), uid
        self.supervisor, self.client = supervisor, client
        self.directory = supervisor.run_dir / "s" / self.id[:12]
        self.directory.mkdir(mode=0o700)
        os.chown(self.directory, uid, uid)
        self.logs = supervisor.run_dir / f"logs-{self.id[:12]}"
        self.logs.mkdir()
        self.peer = StdioPeer(self.directory, self.id, self.token)
        self.shim: ShimClient | None = None

    async def spawn(self, *, resume: bool = False, device: bool = False) -> ShimProcess:
        """Fork a shim (again), connect, tell it where the peer is."""
        found = await self.client.spawn_shim(
            sandbox_id=self.id, directory=str(self.directory), uid=self.uid, gid=self.uid,
            device=device, resume=resume,
        )  # fmt: skip
        await self.connect()
        return found

    async def connect(self) -> ShimClient:
        if self.shim is not None:
            await self.shim.close()
        self.shim = ShimClient(str(self.directory / "control.sock"))
        await self.shim.connect(WAIT)
        await self.shim.agent(HostEndpoint(str(self.directory)), self.token)
        return self.shim

    async def kill(self) -> None:
        """kill -9 of the shim, until the supervisor knows."""
        assert self.shim is not None
        pid = (await self.shim.hello()).pid
        os.kill(pid, signal.SIGKILL)
        await self.shim.closed.wait()

    def path(self, container: str) -> Path:
        return self.logs / container[:8]

    async def log_start(self, container: str, *, tty: bool = False) -> None:
        assert self.shim is not None
        with opened(self.path(container)) as fd:
            await self.shim.log_start(container, tty=tty, fd=fd)

    async def close(self) -> None:
        if self.shim is not None:
            await self.shim.close()


@contextlib.asynccontextmanager
async def pod(supervisor: SupervisorProcess, uid: int = 0) -> AsyncIterator[Pod]:
    """A pod whose peer serves; its shim is spawned by the test."""
    async with supervisor.client() as client:
        one = Pod(supervisor, client, uid)
        async with one.peer:
            os.chown(one.peer.path, uid, uid)
            try:
                yield one
            finally:
                await one.close()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """As the daemon opens a log."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    try:
        yield fd
    finally:
        os.close(fd)


def payload(log: bytes, stream: bytes = b"stdout") -> bytes:
    """The bytes that a log stands for. Fails unless it consists of whole records only."""
    out, end = [], 0
    for match in RECORD.finditer(log):
        assert match.start() == end, log[end : end + 200]
        end = match.end()
        if match[1] == stream:
            out.append(match[3] + (b"\n" if match[2] == b"F" else b""))
    assert end == len(log), log[end : end + 200]
    return b"".join(out)


def processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid()]


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def until(condition: object, seconds: float = WAIT) -> None:
    """Wait for `condition()` to hold, or fail."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)


async def eventually(condition: object, seconds: float = WAIT) -> None:
    """`until`, for tests with a loop."""
    assert callable(condition)
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
