"""One pod of the soak: what runs in it, and what must be true of it at any time."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from pathlib import Path

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import BUSYBOX, Cri
from tests.soak.volumes import SHARED, Volumes
from tests.usernskit import BASE, LENGTH, userns

CONFIG_DELAY = 6.0
"""Seconds within which a guest must see a new configMap; a kubelet itself takes up to a minute to write one."""

WEB = """
trap 'echo bye; exit 0' TERM
httpd -p 8080 -h /data/www
i=0; while :; do echo line $i; i=$((i+1)); sleep 0.2; done
"""
WORKER = """
i=0; while [ $i -lt LINES ]; do echo line $i; echo line $i >&2; i=$((i+1)); done
while [ $i -lt $((LINES + 100)) ]; do
  echo line $i; echo line $i >&2; i=$((i+1)); echo $i >/memory/worker; sleep 0.2
done
echo "gone at $i" >/dev/termination-log; exit 3
"""
INIT = "mkdir -p /data/www && echo UID >/data/www/index.html && echo sub >/data/sub/file && echo line 0"
BURST = 500
"""Lines of the worker at its start, on each stream, as fast as it can."""


class Broken(AssertionError):
    """An invariant does not hold."""


def need(true: bool, what: str) -> None:
    if not true:
        raise Broken(what)


class Pod:
    """Driven by the soak's kubelet; `number` makes names."""

    def __init__(self, client: Cri, base: Path, number: int) -> None:
        self.client, self.uid, self.number = client, secrets.token_hex(8), number
        self.ids: cri.UserNamespace | None = None
        if number % 2:  # hostUsers: false, with ids that no other pod has
            self.ids = userns(BASE + number * LENGTH)
        self.volumes = Volumes(base / "pods" / self.uid, self.uid)
        self.logs = base / "logs" / self.uid
        self.id = self.address = ""
        self.web = self.worker = ""
        self.attempt = 0
        self.dead: list[str] = []
        """Containers that have ended and wait for garbage collection."""
        self.swapped_at = time.monotonic()
        self.seen = 0
        self.rotations = 0
        self.steady = False
        """Between its start and its stop: lists and statistics must know it."""

    @property
    def name(self) -> str:
        return f"soak-{self.number}"

    # -- making -------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Sandbox, init container, app containers, as the kubelet starts a pod."""
        self.volumes.make()
        options = cri.NamespaceOption(userns_options=self.ids)
        security = cri.LinuxSandboxSecurityContext(namespace_options=options)
        config = self.client.pod_config(self.name, security_context=security)
        config.log_directory = str(self.logs)
        self.id = await self.client.run_pod(config)
        status = await self.status()
        need(status.network is not None and bool(status.network.ip), f"{self.name}: no address")
        assert status.network is not None
        self.address = status.network.ip
        init = await self.container("init", INIT.replace("UID", self.uid))
        ended = await self.client.wait(init)
        need((ended.exit_code, ended.reason) == (0, "Completed"), f"{self.name}: init: {ended}")
        self.dead.append(init)
        self.web = await self.container("web", WEB)
        await self.start_worker()
        self.steady = True

    async def start_worker(self) -> None:
        self.worker = await self.container("worker", WORKER.replace("LINES", str(BURST)), self.attempt)

    async def container(self, name: str, script: str, attempt: int = 0) -> str:
        """Create and start."""
        config = cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name=name, attempt=attempt),
            image=cri.ImageSpec(image=BUSYBOX),
            command=["/bin/sh", "-c", script],
            log_path=f"{name}/{attempt}.log",
            mounts=self.volumes.mounts(f"{name}-{attempt}", self.ids),
            labels={"soak": self.name},
            linux=cri.LinuxContainerConfig(
                resources=cri.LinuxContainerResources(
                    cpu_period=100_000, cpu_quota=50_000, cpu_shares=256, memory_limit_in_bytes=48 << 20
                )
            ),
        )
        reply = await self.client.runtime.create_container(
            cri.CreateContainerRequest(pod_sandbox_id=self.id, config=config)
        )
        await self.client.start(reply.container_id)
        return reply.container_id

    async def status(self) -> cri.PodSandboxStatus:
        reply = await self.client.runtime.pod_sandbox_status(
            cri.PodSandboxStatusRequest(pod_sandbox_id=self.id)
        )
        assert reply.status is not None
        return reply.status

    # -- what the kubelet does all the time ---------------------------------------------------------------

    async def probe(self) -> None:
        """Exec probes: mounts, configuration, names; and the pod's address from the node."""
        due = self.volumes.generation if time.monotonic() - self.swapped_at > CONFIG_DELAY else self.seen
        script = "cat /etc/config/a; cat /data-sub/file /host/note; hostname; grep -c of- /etc/hosts"
        reply = await self.client.exec(self.web, "/bin/sh", "-c", script, timeout=120)
        text = reply.stdout.decode()
        need(reply.exit_code == 0, f"{self.name}: probe: {reply.exit_code} {reply.stderr!r}")
        generation, rest = text.split("\n", 1)
        need(rest == f"sub\n{SHARED.decode()}{self.name}\n1\n", f"{self.name}: probe: {text!r}")
        need(int(generation) >= due, f"{self.name}: configMap {generation} is older than {due}")
        self.seen = int(generation)
        denied = await self.client.exec(self.web, "touch", "/host/x", timeout=120)
        need(
            denied.exit_code == 1 and b"Read-only" in denied.stderr, f"{self.name}: writes to /host: {denied}"
        )
        need(await self._fetch() == self.uid, f"{self.name}: another pod answers at {self.address}")

    async def _fetch(self) -> str:
        async with asyncio.timeout(120):
            while True:
                try:
                    reader, writer = await asyncio.open_connection(self.address, 8080)
                    break
                except ConnectionRefusedError:  # the server has just been started
                    await asyncio.sleep(0.5)
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            answer = await reader.read()
            writer.close()
        return answer.split(b"\r\n\r\n", 1)[-1].decode().strip()

    def swap_config(self) -> None:
        self.volumes.swap()
        self.swapped_at = time.monotonic()

    async def rotate(self) -> None:
        """As the kubelet rotates: rename, then ask for a new file."""
        self.rotations += 1
        path = self.logs / "web" / "0.log"
        path.rename(path.with_name(f"0.log.{self.rotations:06}"))
        await self.client.runtime.reopen_container_log(cri.ReopenContainerLogRequest(container_id=self.web))

    async def tend(self) -> None:
        """A worker that has ended is checked and started again; the kubelet keeps one dead container."""
        status = await self.client.status(self.worker)
        if status.state != cri.ContainerState.CONTAINER_EXITED:
            return
        need((status.exit_code, status.reason) == (3, "Error"), f"{self.name}: worker: {status}")
        note = self.volumes.termination_log(f"worker-{self.attempt}").read_text()
        need(note == f"gone at {BURST + 100}\n", f"{self.name}: termination log {note!r}")
        need((self.volumes.memory / "worker").read_text() == f"{BURST + 100}\n", f"{self.name}: /memory")
        for stream in ("stdout", "stderr"):
            got = self.lines("worker", self.attempt, stream)
            need(got == list(range(BURST + 100)), f"{self.name}: worker's {stream}: {len(got)} lines")
        self.dead.append(self.worker)
        self.attempt += 1
        await self.start_worker()
        while len(self.dead) > 1:
            await self.client.runtime.remove_container(
                cri.RemoveContainerRequest(container_id=self.dead.pop(0))
            )

    def lines(self, name: str, attempt: int, stream: str) -> list[int]:
        """The numbers of the lines of one stream in all files of the log, in order."""
        folder = self.logs / name
        files = [*sorted(folder.glob(f"{attempt}.log.*")), folder / f"{attempt}.log"]
        text = "".join(file.read_text() for file in files)
        return [int(n) for n in re.findall(rf"^\S+ {stream} F line (\d+)$", text, re.MULTILINE)]

    # -- the end ------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Graceful: the web server ends by SIGTERM with its last word; then nothing of the pod is left."""
        self.steady = False
        await self.client.stop(self.worker, 0)
        await self.client.stop(self.web, 120)
        status = await self.client.status(self.web)
        need((status.exit_code, status.reason) == (0, "Completed"), f"{self.name}: web: {status}")
        got = self.lines("web", 0, "stdout")
        need(
            got == list(range(len(got))) and len(got) > 0,
            f"{self.name}: web's log: {len(got)} lines, {got[-3:]}",
        )
        need("bye" in (self.logs / "web/0.log").read_text(), f"{self.name}: web's last word is missing")
        status = await self.client.status(self.worker)
        need(status.exit_code in (137, 3), f"{self.name}: worker: {status}")
        await self.client.remove_pod(self.id)
        self.volumes.remove()
