"""Host pods: the agent is a process of this host, in the pod's namespaces and in a cgroup of its own.

    <run_dir>/h/<12 digits>/   root's: the agent's sockets, bundles and mount points, `agent` (its pid and start)
    <state_dir>/scratch/<id>/  writable layers
    <cgroup_parent>/hyperpod-<12 digits>/pod   the containers
    /hyperpod/<12 digits>/agent                agent and shim: beside the pod's, as other runtimes' shims are, so
                                               that no small limit of a pod ends them, slows them or pays for them

An end in order and one by a crash are undone by the same steps: everybody in the cgroups is killed, and what was
mounted ends with the agent's mount namespace, the loop devices of the layers with their mounts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from hyperpod import failpoints, processes
from hyperpod.agent.main import PATH
from hyperpod.agent.rootfs import remove_tree
from hyperpod.agentclient.types import HelloInfo
from hyperpod.errors import FailedPrecondition, HyperpodError, Unavailable
from hyperpod.model.base import now_ns
from hyperpod.model.network import PodNetwork
from hyperpod.model.security import NamespaceMode
from hyperpod.network import hostdns
from hyperpod.sandbox.builder import DEFAULT_SYSCTLS, Built, Common, SandboxBuilder, hostname
from hyperpod.sandbox.live import LiveSandbox
from hyperpod.sandbox.phases import Phases
from hyperpod.sandbox.threads import MountThreads, mounting, process_end
from hyperpod.share import binds
from hyperpod.spec import mountinfo, podfiles
from hyperpod.spec.cgroup import sandbox_folder
from hyperpod.spec.mounts import HostBind
from hyperpod.spec.userns import map_line
from hyperpod.tasks import settle_all

log = logging.getLogger(__name__)

AGENT_TIMEOUT = 20.0
"""Seconds for a host agent to listen; 50 ms is usual."""

END_TIMEOUT = 5.0
"""Seconds for a killed agent to be gone."""

HOSTS = Path("/etc/hosts")


class HostBuilder(SandboxBuilder):
    """Makes and unmakes host sandboxes."""

    def __init__(self, common: Common) -> None:
        super().__init__(common)
        self._threads = MountThreads()
        self._crun = CrunVersion()

    def cgroup(self, sandbox: LiveSandbox) -> str:
        return f"{sandbox_folder('', sandbox.id)}/agent"

    def scratch_path(self, sandbox: LiveSandbox) -> Path:
        return self.config.state_dir / "scratch" / sandbox.id

    def scratch_bytes(self, sandbox: LiveSandbox) -> int:
        try:
            disk = os.statvfs(self.scratch_path(sandbox))
        except FileNotFoundError:
            return 0
        return disk.f_blocks * disk.f_frsize

    async def build(self, sandbox: LiveSandbox) -> Built:
        """The plugins take most of the time: agent and shim start meanwhile, in the namespace that they fill."""
        phases, record = Phases(), sandbox.record
        netns: Path | None = None
        find_crun()
        with phases("folders"):
            if record.config.namespaces.network is not NamespaceMode.NODE:
                netns = await self.networks.namespaces.make(record.id, record.config.namespaces.userns)
            await asyncio.to_thread(self._make_folders, sandbox)
            failpoints.passing("sandbox.scratch")

        async def fill() -> PodNetwork | None:
            if netns is None:
                return None
            with phases("network"):
                await sandbox.on_disk()
                return await self.networks.attach(record, vm=False, netns=netns)

        async def agent() -> None:
            with phases("agent"):
                await self._start_agent(sandbox)
                failpoints.passing("sandbox.agent-started")
            with phases("claim"):
                await self._claim(sandbox)

        async def shim() -> None:
            with phases("shim"):
                await self.start_shim(sandbox, resume=False)
                failpoints.passing("sandbox.shim")

        network, _, _ = await settle_all(fill(), agent(), shim())
        with phases("hello"):
            hello = await self._greet(sandbox, network)
            failpoints.passing("sandbox.agent")
        return Built(hello, phases, network)

    def _make_folders(self, sandbox: LiveSandbox) -> None:
        scratch, home = self.scratch_path(sandbox), sandbox.agent_home
        for folder, mode in ((scratch.parent, 0o711), (home.parent, 0o711)):
            folder.mkdir(parents=True, exist_ok=True, mode=mode)
        scratch.mkdir(mode=0o700)
        home.mkdir(mode=0o711)  # the shim connects to one of the sockets in it
        sandbox.agent_share.mkdir(mode=0o711)
        self.make_directory(sandbox)

    async def _start_agent(self, sandbox: LiveSandbox) -> None:
        record = sandbox.record
        options = record.config.namespaces
        own_network = options.network is not NamespaceMode.NODE
        await self.cgroups.make(self.root_cgroup(sandbox))
        cgroup = await self.cgroups.make(self.cgroup(sandbox))
        pid, began = await self.supervisor.spawn_agent(
            directory=str(sandbox.agent_home),
            scratch=str(self.scratch_path(sandbox)),
            cgroup_path=f"{self.root_cgroup(sandbox)}/pod",
            netns=str(self.networks.namespaces.path(record.id)) if own_network else "",
            uts=own_network,  # as Kubernetes has it: who has the node's network has its name
            ipc=options.ipc is not NamespaceMode.NODE,
            pid=options.pid is NamespaceMode.POD,
            uids=map_line(options.userns.uids) if options.userns else "",
            gids=map_line(options.userns.gids) if options.userns else "",
            stdio_uid=record.uid,
            crun_version=self._crun.known(),
            cgroup=cgroup,
        )
        processes.remember(_pid_file(sandbox), pid, began)

    async def _claim(self, sandbox: LiveSandbox) -> None:
        async def watch() -> None:
            sandbox.gone_detail = await self.death(sandbox)
            sandbox.gone.set()

        watcher = asyncio.get_running_loop().create_task(watch(), name=f"agent/{sandbox.short}")
        try:
            await self.claim(sandbox, AGENT_TIMEOUT, "claim")
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    async def _greet(self, sandbox: LiveSandbox, network: PodNetwork | None) -> HelloInfo:
        config = sandbox.record.config
        name = os.uname().nodename if network is None else hostname(config)
        hosts = (
            await asyncio.to_thread(_hosts) if network is None else podfiles.hosts(name, network.addresses)
        )
        # Who is in the host's network reaches a stub resolver on its loopback too.
        resolver = hostdns.host_resolv_conf(stub=network is None)
        client = await sandbox.session.client()
        hello = await client.hello(
            host_time_ns=now_ns(),
            entropy=b"",
            hostname=name,
            sysctls={**({} if network is None else DEFAULT_SYSCTLS), **config.sysctls},
            resolv_conf=podfiles.resolv_conf(config.dns, resolver),
            hosts=hosts,
            userns=config.namespaces.userns,
        )
        self._crun.learn(hello.crun_version)
        return hello

    # -- its life -----------------------------------------------------------------------------------------

    def agent_pid(self, sandbox: LiveSandbox) -> int:
        """Of the agent that `build` started; 0 when it is not there any more."""
        return processes.recall(_pid_file(sandbox))

    async def death(self, sandbox: LiveSandbox) -> str:
        if pid := self.agent_pid(sandbox):
            await process_end(pid)
        return "its agent, a process of the host, ended"

    async def mount(self, sandbox: LiveSandbox, wanted: Sequence[HostBind]) -> list[str]:
        share, pid = sandbox.agent_share, self.agent_pid(sandbox)
        if not pid:
            raise Unavailable(f"sandbox {sandbox.short}: its agent has ended")
        ids = sandbox.record.config.namespaces.userns
        target = binds.Target(f"/proc/{pid}/ns/mnt", share, inside=str(share), guest=False, ids=ids)
        cancelled = threading.Event()
        await self._threads.run(lambda: binds.bind(target, wanted, cancelled), mounting(wanted), cancelled)
        return []

    async def unmount(self, sandbox: LiveSandbox, container_id: str) -> None:
        try:
            await asyncio.to_thread(binds.release, sandbox.agent_share, container_id)
        except OSError as exc:
            log.error("container %s: mount points stay until the pod ends: %s", container_id[:12], exc)

    async def weigh(self, sandbox: LiveSandbox, score: int) -> None:
        """Nothing: its containers have their own, agent and shim keep the service's."""

    async def tear_down(self, sandbox: LiveSandbox) -> None:
        await sandbox.session.end(sandbox.gone_detail)
        pid = self.agent_pid(sandbox)
        # Both at once, and waited for: then their cgroup goes at the first attempt.
        _, ended = await settle_all(self.end_shim(sandbox), _kill(pid))
        own = {self.root_cgroup(sandbox), sandbox_folder("", sandbox.id)}
        left = await settle_all(*map(self.cgroups.remove, own))
        if alive := [number for numbers in left for number in numbers]:
            raise Unavailable(
                f"sandbox {sandbox.short}: its processes {', '.join(map(str, alive[:8]))} do not die, do they wait "
                "for a disk or a server? Stop the pod again when that answers"
            )
        if not ended:
            raise Unavailable(f"sandbox {sandbox.short}: its agent, process {pid}, does not die")
        failpoints.passing("sandbox.destroyed")

        def remove() -> None:
            shutil.rmtree(sandbox.directory, ignore_errors=True)
            remove_home(sandbox.agent_home)
            _remove_scratch(self.scratch_path(sandbox))

        await asyncio.to_thread(remove)


async def _kill(pid: int) -> bool:
    """Whether it is gone within END_TIMEOUT; 0 is none."""
    if not pid:
        return True
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    try:
        async with asyncio.timeout(END_TIMEOUT):
            await process_end(pid)
    except TimeoutError:
        return False
    return True


class CrunVersion:
    """What an agent has found out, for as long as it is the same file: asking crun takes as long as an exec."""

    def __init__(self) -> None:
        self._version, self._file = "", (0, 0)

    def known(self) -> str:
        return self._version if self._file == self._look() else ""

    def learn(self, version: str) -> None:
        self._version, self._file = version, self._look()

    @staticmethod
    def _look() -> tuple[int, int]:
        try:
            status = find_crun().stat()
        except (FailedPrecondition, FileNotFoundError):
            return (0, 0)
        return status.st_ino, status.st_mtime_ns


def find_crun(path: str = PATH) -> Path:
    """The host's, as its agents find it. Raises FailedPrecondition when there is none."""
    if (found := shutil.which("crun", path=path)) is None:
        raise FailedPrecondition(f"host pods need crun, which is in none of {path}: apt-get install crun")
    return Path(found)


def remove_home(home: Path) -> None:
    """Remove an agent's folder. Raises HyperpodError when something is mounted below it: its mounts were in a
    namespace of its own, so this is somebody's files. Fine when it is not there."""
    if not home.exists():
        return
    above = f"{home}/"
    for mount in mountinfo.parse(Path("/proc/self/mountinfo").read_bytes()).values():
        if mount.path.startswith(above):
            raise HyperpodError(f"{mount.path} is a mount of the host: unmount it, {home} is to be removed")
    remove_tree(str(home))


def _remove_scratch(path: Path) -> None:
    """What containers could write to: of any depth."""
    if path.exists():
        remove_tree(str(path))


def _pid_file(sandbox: LiveSandbox) -> Path:
    return sandbox.agent_home / "agent"


def _hosts() -> str:
    """The node's own names, for who is in its network."""
    with contextlib.suppress(OSError), HOSTS.open("rb") as file:
        return file.read(hostdns.LIMIT).decode(errors="replace")
    return ""
