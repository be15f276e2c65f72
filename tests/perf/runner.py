"""One runtime in a race: a pod's life through its CRI socket, its pods' memory, its logs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import BUSYBOX, Cri

T = TypeVar("T")
AT_ONCE = 4
IDLE_PODS = 10
IDLE = 2.0
"""Seconds of rest before memory is looked at."""

OWN_PIDS = cri.NamespaceOption(pid=cri.NamespaceMode.CONTAINER)
DEFAULT = cri.SecurityProfile(profile_type=cri.SecurityProfileProfileType.RuntimeDefault)
"""As a kubelet asks."""

CGROUPS = "hyperpod-race"
"""What a kubelet would make for the pods, and remove."""

LINE = 100
"""Bytes of a line of output, with its end."""

LOGGED = 60.0
"""Seconds for a container's output to be in its log."""

STEPS = (
    "RunPodSandbox", "CreateContainer", "StartContainer", "pod to first log line", "ExecSync",
    "StopPodSandbox", "RemovePodSandbox",
)  # fmt: skip


@dataclass
class Runner:
    """One runtime. `marker`: in the command line of each process of its pods. `servers`: who serves all pods."""

    name: str
    client: Cri
    marker: str
    servers: Callable[[], set[int]]
    logs: Path
    seconds: dict[str, list[float]] = field(default_factory=dict)
    phases: dict[str, list[float]] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    """MiB of one pod: idle, and with a container that sleeps."""
    logged: list[float] = field(default_factory=list)

    async def timed(self, step: str, call: Awaitable[T]) -> T:
        start = time.monotonic()
        result = await call
        self.seconds.setdefault(step, []).append(time.monotonic() - start)
        return result

    # -- one pod ------------------------------------------------------------------------------------------

    def config(self) -> cri.PodSandboxConfig:
        ident = secrets.token_hex(4)
        return cri.PodSandboxConfig(
            metadata=cri.PodSandboxMetadata(name=f"race-{ident}", uid=ident, namespace="test"),
            hostname=f"race-{ident}",
            log_directory=str(self.logs / ident),
            linux=cri.LinuxPodSandboxConfig(
                cgroup_parent=f"/{CGROUPS}/{ident}",
                security_context=cri.LinuxSandboxSecurityContext(namespace_options=OWN_PIDS, seccomp=DEFAULT),
            ),
        )

    async def run_pod(self, config: cri.PodSandboxConfig) -> str:
        request = cri.RunPodSandboxRequest(config=config, runtime_handler=self.client.handler)
        return (await self.client.runtime.run_pod_sandbox(request)).pod_sandbox_id

    async def create(
        self, pod: str, config: cri.PodSandboxConfig, *argv: str, mounts: list[cri.Mount] | None = None
    ) -> str:
        container = cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name="c"),
            image=cri.ImageSpec(image=BUSYBOX),
            command=list(argv),
            log_path="c.log",
            mounts=mounts or [],
            linux=cri.LinuxContainerConfig(
                security_context=cri.LinuxContainerSecurityContext(
                    namespace_options=OWN_PIDS, seccomp=DEFAULT
                )
            ),
        )
        request = cri.CreateContainerRequest(pod_sandbox_id=pod, config=container, sandbox_config=config)
        return (await self.client.runtime.create_container(request)).container_id

    async def pod(self) -> None:
        """The whole sequence."""
        runtime, config = self.client.runtime, self.config()
        log = Path(config.log_directory) / "c.log"
        start = time.monotonic()
        pod = await self.timed("RunPodSandbox", self.run_pod(config))
        script = "echo ready; exec sleep 600"
        container = await self.timed("CreateContainer", self.create(pod, config, "/bin/sh", "-c", script))
        await self.timed("StartContainer", self.client.start(container))
        while not (log.exists() and log.stat().st_size):
            await asyncio.sleep(0.001)
        self.seconds.setdefault("pod to first log line", []).append(time.monotonic() - start)
        reply = await self.timed("ExecSync", self.client.exec(container, "/bin/echo", "hello"))
        assert (reply.stdout, reply.exit_code) == (b"hello\n", 0)
        stop = cri.StopPodSandboxRequest(pod_sandbox_id=pod)
        await self.timed("StopPodSandbox", runtime.stop_pod_sandbox(stop))
        await self._note_phases(pod)
        remove = cri.RemovePodSandboxRequest(pod_sandbox_id=pod)
        await self.timed("RemovePodSandbox", runtime.remove_pod_sandbox(remove))

    async def _note_phases(self, pod: str) -> None:
        """Ours tells where the time went."""
        request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
        info = (await self.client.runtime.pod_sandbox_status(request)).info
        for call, parts in {
            "RunPodSandbox": json.loads(info.get("timings", "{}")),
            **json.loads(info.get("calls", "{}")),
        }.items():
            for name, value in parts.items():
                self.phases.setdefault(f"{call}: {name}", []).append(float(value))

    async def together(self, rounds: int) -> None:
        """AT_ONCE of them, each `rounds` pods one after the other."""
        quiet = Runner(self.name, self.client, self.marker, self.servers, self.logs)

        async def several() -> None:
            for _ in range(rounds):
                await quiet.pod()

        start = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(several())
        self.rates.append(AT_ONCE * rounds / (time.monotonic() - start))

    # -- memory -------------------------------------------------------------------------------------------

    async def idle(self) -> None:
        """PSS of all that IDLE_PODS pods have, divided by them: without a container, then with one that sleeps."""
        pods = [(await self.run_pod(config), config) for config in (self.config() for _ in range(IDLE_PODS))]
        await asyncio.sleep(IDLE)
        self.memory.append(sum(map(pss, self._processes())) / IDLE_PODS / 2**20)
        for pod, config in pods:
            await self.client.start(await self.create(pod, config, "/bin/sleep", "600"))
        await asyncio.sleep(IDLE)
        self.memory.append(sum(map(pss, self._processes())) / IDLE_PODS / 2**20)
        for pod, _ in pods:
            await self.client.remove_pod(pod)

    def _processes(self) -> set[int]:
        """Of its pods, with the containers' own."""
        parents = dict(_parents())
        found = {pid for pid in parents if self.marker in _command_line(pid)} - self.servers()
        while fresh := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= fresh
        return found

    # -- logs ---------------------------------------------------------------------------------------------

    async def logging(self, lines: Path, digest: str) -> None:
        """MB/s from the first byte in the log to the last. Fails when the log does not stand for the very bytes."""
        config = self.config()
        log = Path(config.log_directory) / "c.log"
        pod = await self.run_pod(config)
        mounts = [cri.Mount(container_path="/lines", host_path=str(lines), readonly=True)]
        container = await self.create(pod, config, "/bin/cat", "/lines", mounts=mounts)
        await self.client.start(container)
        while not (log.exists() and log.stat().st_size):
            await asyncio.sleep(0.001)
        began = grown = time.monotonic()
        size, ended = 0, False
        while not ended or time.monotonic() < grown + 0.5:
            if (now := log.stat().st_size) != size:
                size, grown = now, time.monotonic()
            assert time.monotonic() < began + LOGGED
            ended = (
                ended or (await self.client.status(container)).state == cri.ContainerState.CONTAINER_EXITED
            )
            await asyncio.sleep(0.005)
        told, count = hashlib.sha256(), 0
        with log.open("rb") as file:
            for row in file:
                _, stream, tag, text = row.split(b" ", 3)
                assert (stream, tag) == (b"stdout", b"F")
                told.update(text)
                count += len(text)
        assert told.hexdigest() == digest, f"{self.name}: the log has other bytes, {count} of them"
        self.logged.append(count / 2**20 / (grown - began))
        await self.client.remove_pod(pod)


def remove_cgroups() -> None:
    for hierarchy in Path("/sys/fs/cgroup").iterdir():
        for folder, _, _ in os.walk(hierarchy / CGROUPS, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()


def pss(pid: int) -> int:
    """Bytes: its own memory, and its share of what it has in common with others."""
    with contextlib.suppress(OSError):
        for row in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if row.startswith("Pss:"):
                return int(row.split()[1]) * 1024
    return 0


def _parents() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                yield int(entry.name), int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])


def _command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""


def write_lines(path: Path, mebibytes: int) -> str:
    """Numbered lines of LINE bytes; their digest."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, mebibytes * 2**20 // LINE, 10_000):
            block = b"".join(
                b"%012d %s\n" % (number, b"." * (LINE - 14)) for number in range(start, start + 10_000)
            )
            digest.update(block)
            file.write(block)
    return digest.hexdigest()
