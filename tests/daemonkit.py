"""A real daemon in folders of its own, a CRI client, and a look at what it leaves behind."""

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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from grpclib.client import Channel

from hyperpod.api.gen.hyperpod.admin.v1 import AdminStub, LoadRequest
from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.processes import stat_fields
from tests import daemonlogs, runs
from tests.netkit import Network, taps

ROOT = Path(__file__).resolve().parent.parent
BUSYBOX = "docker.io/library/busybox:latest"

PROCESSES = ("qemu", "shim", "virtiofsd", "hyperpod-agent")
"""Words of the command lines of what a pod has on the host."""

PATIENCE = 180.0
"""Seconds for whatever is waited for. On a busy host an emulated guest is ten times slower; who comes in time does
not wait longer for it."""


def artifact(variable: str, script: str) -> Path:
    """The guest kernel or image: from the environment (as `./dev test` sets it), else from the cache."""
    if value := os.environ.get(variable):
        return Path(value)
    found = subprocess.run(
        [sys.executable, ROOT / script, "--print-path"], capture_output=True, text=True, check=True
    )
    path = Path(found.stdout.strip().splitlines()[-1])
    assert (path / "manifest.json").exists(), f"{path} is not built; run `./dev kernel` and `./dev image`"
    return path


class Daemon:
    """`hyperpod serve` as a child process."""

    def __init__(
        self,
        base: Path,
        config: str = "",
        kernel: Path | None = None,
        guest: Path | None = None,
        log_level: str = "debug",
    ) -> None:
        self.base, self.state, self.logs = base, base / "state", base / "logs"
        self.run_dir = Path(f"/run/hp-{secrets.token_hex(4)}")
        runs.record("folder", str(self.run_dir))
        self.socket = self.run_dir / "cri.sock"
        self.log = base / "daemon.log"
        self.logs.mkdir(parents=True)
        self.network = Network(base)
        kernel = kernel or artifact("HYPERPOD_TEST_KERNEL", "kernel/build.py")
        guest = guest or artifact("HYPERPOD_TEST_GUEST", "images/build.py")
        head, _, rest = config.partition("---")
        (base / "config.toml").write_text(
            f'state_dir = "{self.state}"\nrun_dir = "{self.run_dir}"\nlog_level = "{log_level}"\n{head}\n'
            f'[network]\nconf_dir = "{self.network.conf_dir}"\n'
            f'[vm]\nkernel = "{kernel}"\nguest = "{guest}"\n'
            f"default_memory_mib = 160\nscratch_mib = 512\n{rest}"
        )
        self.process: subprocess.Popen[bytes] | None = None
        self._ready_seen = 0

    def start(self, **env: str) -> None:
        """Start the supervisor, which starts the daemon; returns when the socket listens."""
        self._ready_seen = self.text().count("ready on unix://")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hyperpod", "serve", "--config", str(self.base / "config.toml")],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT, start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            )  # fmt: skip
        self.wait_ready()

    def wait_ready(self) -> None:
        """Wait for one more "ready" line than were seen before."""
        deadline = time.monotonic() + PATIENCE
        while (count := self.text().count("ready on unix://")) <= self._ready_seen:
            assert self.process is not None
            assert self.process.poll() is None, f"the supervisor ended:\n{self.text()[-4000:]}"
            assert time.monotonic() < deadline, f"the daemon is not ready:\n{self.text()[-4000:]}"
            time.sleep(0.05)
        self._ready_seen = count

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def pid(self) -> int:
        """The daemon's own pid (the supervisor's child that runs hyperpod.daemon)."""
        assert self.process is not None
        # Not by the kernel's list of children, which leaves some out when another ends meanwhile.
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if (
                    entry.name.isdecimal()
                    and b"hyperpod.daemon" in (entry / "cmdline").read_bytes()
                    and int(stat_fields(entry.name)[1]) == self.process.pid
                ):
                    return int(entry.name)
        raise AssertionError("the daemon is not running")

    def kill_daemon(self) -> None:
        """kill -9 of the daemon alone; the supervisor starts another."""
        os.kill(self.pid(), signal.SIGKILL)
        self.wait_ready()

    def kill_supervisor(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def processes(self) -> list[str]:
        """Command lines of live processes that belong to this daemon's folders."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if str(self.run_dir) in line and "hyperpod.daemon" not in line:
                        found.append(f"{entry.name} {line[:160]}")
        return found

    def cgroups(self) -> list[str]:
        """Cgroups, ours and libvirt's, of every sandbox that the log tells of."""
        return runs.pod_cgroups(self.text())

    def loops(self, patience: float = 30.0) -> list[str]:
        """Loop devices over layers of this daemon. The kernel frees them a moment after the last mount's end:
        those that are there for `patience` seconds."""
        deadline = time.monotonic() + patience
        while True:
            found = []
            for path in Path("/sys/block").glob("loop*/loop/backing_file"):
                with contextlib.suppress(OSError):
                    if str(self.base) in (text := path.read_text()):
                        found.append(f"{path.parts[3]} {text.strip()}")
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.02)

    def leftovers(self) -> list[str]:
        """What is there although no pod is: QEMUs, file servers, mounts, cgroups, folders, disks, records."""
        left = [line for line in self.processes() if any(w in line for w in PROCESSES)]
        left += self.loops()
        left += self.cgroups()
        left += [
            m
            for m in Path("/proc/mounts").read_text().splitlines()
            if str(self.base) in m or str(self.run_dir) in m
        ]
        for folder in (
            self.run_dir / "s",
            self.run_dir / "h",
            self.run_dir / "m",
            self.state / "scratch",
            self.state / "sandboxes",
            self.state / "containers",
            self.run_dir / "netns",
            self.run_dir / "plugins",
        ):
            if folder.is_dir():
                left += [
                    str(path) for path in folder.iterdir() if not path.name.startswith(("template", "."))
                ]
        shorts = set(re.findall(r"sandbox ([0-9a-f]{12})\b", self.text()))
        left += [name for name in taps() if name[2:14] in shorts]
        return left + self.network.leftovers()

    def add_plugin(self, name: str, script: str) -> None:
        """A CNI plugin beside Debian's, for a daemon that starts anew."""
        path, config = self.base / "bin" / name, self.base / "config.toml"
        path.parent.mkdir()
        path.write_text(script)
        path.chmod(0o755)
        bins = f'[network]\nbin_dirs = ["/usr/lib/cni", "{path.parent}"]'
        config.write_text(config.read_text().replace("[network]", bins))
        self.stop()
        self.start()

    def unmount_namespaces(self) -> None:
        """As the end of the host does: what was in them is gone."""
        for mount in (self.run_dir / "netns").glob("*"):
            subprocess.run(["umount", "-l", mount], capture_output=True, check=False)

    def destroy(self) -> None:
        """After the tests: nothing of this daemon may live on."""
        self.stop()
        for line in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line.split()[0]), signal.SIGKILL)
        for top in self.cgroups():
            runs.end_cgroup(top)
        self.unmount_namespaces()
        self.network.destroy()
        shutil.rmtree(self.run_dir, ignore_errors=True)

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Cri]:
        channel = Channel(path=str(self.socket))
        try:
            yield Cri(self, channel)
        finally:
            channel.close()


class Cri:
    """Short-hands over the generated stubs."""

    def __init__(self, daemon: Daemon, channel: Channel) -> None:
        self.daemon = daemon
        self.handler = ""
        """Of the pods that `run_pod` makes."""
        self.runtime = cri.RuntimeServiceStub(channel)
        self.images = cri.ImageServiceStub(channel)
        self.admin = AdminStub(channel)

    async def load_busybox(self) -> None:
        folder = self.daemon.base / "busybox"
        if not folder.exists():
            subprocess.run(
                [sys.executable, ROOT / "images" / "busybox.py", folder], check=True, capture_output=True
            )
        await self.admin.load(LoadRequest(path=str(folder)))

    def pod_config(self, name: str = "", **linux: Any) -> cri.PodSandboxConfig:
        ident = secrets.token_hex(4)
        return cri.PodSandboxConfig(
            metadata=cri.PodSandboxMetadata(name=name or f"pod-{ident}", uid=ident, namespace="test"),
            hostname=name or f"pod-{ident}",
            log_directory=str(self.daemon.logs / ident),
            labels={"app": "test"},
            linux=cri.LinuxPodSandboxConfig(**linux),
        )

    async def run_pod(self, config: cri.PodSandboxConfig | None = None) -> str:
        request = cri.RunPodSandboxRequest(config=config or self.pod_config(), runtime_handler=self.handler)
        return (await self.runtime.run_pod_sandbox(request)).pod_sandbox_id

    async def remove_pod(self, ident: str) -> None:
        await self.runtime.stop_pod_sandbox(cri.StopPodSandboxRequest(pod_sandbox_id=ident))
        await self.runtime.remove_pod_sandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=ident))

    async def create(self, pod: str, *argv: str, name: str = "", **more: Any) -> str:
        name = name or f"c-{secrets.token_hex(3)}"
        values: dict[str, Any] = {
            "image": cri.ImageSpec(image=BUSYBOX),
            "command": list(argv),
            "log_path": f"{name}.log",
            **more,
        }
        config = cri.ContainerConfig(metadata=cri.ContainerMetadata(name=name), **values)
        request = cri.CreateContainerRequest(pod_sandbox_id=pod, config=config)
        return (await self.runtime.create_container(request)).container_id

    async def start(self, container: str) -> None:
        await self.runtime.start_container(cri.StartContainerRequest(container_id=container))

    async def run(self, pod: str, *argv: str, **more: Any) -> str:
        container = await self.create(pod, *argv, **more)
        await self.start(container)
        return container

    async def sh(self, pod: str, script: str, **more: Any) -> str:
        return await self.run(pod, "/bin/sh", "-c", script, **more)

    async def stop(self, container: str, timeout: int = 0) -> None:
        await self.runtime.stop_container(cri.StopContainerRequest(container_id=container, timeout=timeout))

    async def status(self, container: str) -> cri.ContainerStatus:
        reply = await self.runtime.container_status(cri.ContainerStatusRequest(container_id=container))
        assert reply.status is not None
        return reply.status

    async def wait(self, container: str, seconds: float = PATIENCE) -> cri.ContainerStatus:
        """Until it has exited."""

        def exited(status: cri.ContainerStatus) -> bool:
            return status.state == cri.ContainerState.CONTAINER_EXITED

        return await eventually(lambda: self.status(container), exited, seconds)

    async def log(self, container: str) -> list[tuple[str, str, str]]:
        """The CRI log as (stream, F or P, text)."""
        path = Path((await self.status(container)).log_path)
        out = []
        for line in path.read_bytes().decode(errors="replace").split("\n")[:-1]:
            _, stream, tag, text = line.split(" ", 3)
            out.append((stream, tag, text))
        return out

    async def logged(self, container: str, *texts: str) -> list[tuple[str, str, str]]:
        """The log, once each of `texts` is a line of it; whichever comes last, two streams have no order."""

        def there(log: list[tuple[str, str, str]]) -> bool:
            return set(texts) <= {text for _, _, text in log}

        return await eventually(lambda: self.log(container), there)

    async def exec(self, container: str, *argv: str, timeout: int = 180) -> cri.ExecSyncResponse:
        return await self.runtime.exec_sync(
            cri.ExecSyncRequest(container_id=container, cmd=list(argv), timeout=timeout)
        )


Seen = TypeVar("Seen")


async def eventually(
    look: Callable[[], Awaitable[Seen]], good: Callable[[Seen], bool], seconds: float = PATIENCE
) -> Seen:
    """What `look` sees as soon as that is `good`."""
    deadline = time.monotonic() + seconds
    while not good(seen := await look()):
        assert time.monotonic() < deadline, f"after {seconds} s still: {seen}"
        await asyncio.sleep(0.05)
    return seen


@contextlib.contextmanager
def daemon(
    config: str = "",
    kernel: Path | None = None,
    guest: Path | None = None,
    log_level: str = "debug",
    **env: str,
) -> Iterator[Daemon]:
    """A started daemon that is wholly gone afterwards. `env`: more of its environment."""
    base = Path(tempfile.mkdtemp(prefix="hyperpod-test-"))
    runs.record("folder", str(base))
    base.chmod(0o711)
    one = Daemon(base, config, kernel, guest, log_level)
    daemonlogs.follow(one.log)
    try:
        one.start(**env)
        yield one
    finally:
        one.destroy()
        daemonlogs.ends(one.log)
        shutil.rmtree(base, ignore_errors=True)
