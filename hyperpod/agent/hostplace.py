"""A host process as the place of a pod: the agent lives in the pod's own network, IPC and UTS namespaces.

So containers inherit them as they inherit a guest's, and the pod's port-forwards, host name, sysctls and figures
need no code of their own. Its mount namespace gets the host's later mounts and gives none back: whatever the agent
mounts ends with its last process, however that ends. A pod's pid namespace cannot be the agent's, which has to see
its children: a process that only reaps holds it.
"""

from __future__ import annotations

import asyncio
import os
import resource
from dataclasses import dataclass
from typing import Any

from hyperpod.agent import linux, rootfs, userns
from hyperpod.agent.cgroups import ROOT as CGROUP_ROOT
from hyperpod.agent.cgroups import Cgroups
from hyperpod.agent.crun import Crun
from hyperpod.agent.environment import Place, set_hostname, set_sysctl
from hyperpod.agent.layout import Layout
from hyperpod.agent.pidholder import PidNamespace, hold_pid_namespace
from hyperpod.agent.userns import IdMap, PodUser
from hyperpod.api.gen.hyperpod.agent import v1
from hyperpod.errors import InvalidArgument
from hyperpod.spec.capabilities import NUMBERS

SHM_SIZE = "64m"


@dataclass(frozen=True)
class HostOptions:
    """`directory`: root's, for sockets and bundles. `scratch`: for writable layers, a folder of the host's disk.

    `cgroup`: of all containers. `netns`: path of the pod's network namespace; empty: the host's. `uts`, `ipc`,
    `pid`: the pod has one of its own. `uids`, `gids`: the line of the map of the user namespace that the network
    namespace belongs to; empty: the pod has none of its own. `stdio_uid`: who may open streams, beside root; `None`
    is nobody.
    """

    directory: str
    scratch: str = ""
    cgroup: str = ""
    netns: str = ""
    uts: bool = False
    ipc: bool = False
    pid: bool = False
    uids: str = ""
    gids: str = ""
    stdio_uid: int | None = None
    crun_version: str = ""
    """If known already."""


class HostPlace(Place):
    """See the module."""

    def __init__(self, layout: Layout, ended: asyncio.Event, options: HostOptions) -> None:
        super().__init__(layout, ended)
        self._options = options

    @staticmethod
    def prepare(options: HostOptions) -> tuple[Layout, Cgroups, HostProcesses]:
        """Before there is a second thread: what it enters, it enters for itself and what it starts."""
        os.makedirs(options.directory, mode=0o700, exist_ok=True)
        os.umask(0o022)
        linux.become_subreaper()
        linux.leave_session_keys()  # crun makes a container new ones, and hands ours down to its execs
        user = _enter(options)
        if options.ipc:  # what lies there is the IPC namespace's: shm_open(3)
            safe = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
            linux.mount("tmpfs", "/dev/shm", "tmpfs", safe, f"mode=1777,size={SHM_SIZE}")  # not a file
            if user is not None:
                user.own("/dev/shm")
        if os.path.exists(f"{CGROUP_ROOT}/unified/cgroup.controllers"):
            # crun refuses v1 with controllers left in v2 ("hybrid"); without this mount it sees plain v1.
            linux.umount(f"{CGROUP_ROOT}/unified", linux.MNT_DETACH)
        name = os.path.basename(options.directory.rstrip("/"))
        layout = Layout(
            root=options.directory,
            scratch=options.scratch or f"{options.directory}/s",
            cgroup=options.cgroup or f"/hyperpod/{name}",
            guest=False,
        )
        cgroups = Cgroups(layout.cgroup)
        cgroups.setup()
        pids = hold_pid_namespace(user.fd if user else -1) if options.pid else None
        return layout, cgroups, HostProcesses(pids, user)

    @staticmethod
    async def clean(layout: Layout, cgroups: Cgroups) -> None:
        """Remove what an agent that died left in the same directory."""
        await cgroups.kill(layout.cgroup)
        for name in cgroups.children(layout.cgroup):
            cgroups.remove(f"{layout.cgroup}/{name}")
        for path in (layout.crun_root, f"{layout.root}/b", layout.layers, layout.scratch):
            if os.path.exists(path):
                rootfs.remove_tree(path)
        layout.make()

    async def crun_version(self, crun: Crun) -> str:
        return self._options.crun_version or await super().crun_version(crun)

    async def greet(self, hello: v1.HelloRequest) -> None:
        """A host agent shares its kernel: it sets what belongs to the pod's namespaces and refuses the rest."""
        if hello.interfaces:
            raise InvalidArgument("a host agent makes no network: the plugins have made it")
        if hello.hostname and self._options.uts:
            set_hostname(hello.hostname)
        for name, value in hello.sysctls.items():
            if not self._owns(name):
                raise InvalidArgument(f"sysctl {name[:80]!r} is the host's; the pod has no namespace for it")
            set_sysctl(name, value, self.user)
        self.write_files(hello)

    def _owns(self, sysctl: str) -> bool:
        from hyperpod.spec.sysctls import namespace_of  # most pods name none

        has = {"network": bool(self._options.netns), "ipc": self._options.ipc}
        return has.get(namespace_of(sysctl), False)


def _enter(options: HostOptions) -> PodUser | None:
    """The pod's namespaces and a mount namespace of our own; gives its user namespace if it has one."""
    own = linux.CLONE_NEWNS
    user = None
    if options.uids:  # and then it has all the others
        made = userns.Namespaces(IdMap.parse(options.uids), IdMap.parse(options.gids), options.netns)
        made.enter()
        user = made.user
    else:
        own |= linux.CLONE_NEWUTS if options.uts else 0
        own |= linux.CLONE_NEWIPC if options.ipc else 0
    linux.unshare(own)
    linux.mount("none", "/", "", linux.MS_REC | linux.MS_SLAVE)
    if options.netns and user is None:
        linux.enter_network(options.netns)
    return user


class HostProcesses:
    """What an OCI spec for a process on the host lacks. `pids`: the pod's pid namespace; None: it has none, and a
    spec without one means the host's. `user`: its user namespace, if it has one."""

    def __init__(self, pids: PidNamespace | None = None, user: PodUser | None = None) -> None:
        self.pids, self.user = pids, user
        mine = _permitted()  # which nobody changes but this process itself, and it does not
        self._has = {name: bool(mine >> number & 1) for name, number in NUMBERS.items()}
        self._limited = not self._has["CAP_SYS_RESOURCE"]

    def complete(self, spec: dict[str, Any]) -> None:
        """Of a container: the pod's pid namespace, and what the first process may have."""
        userns.share_pids(spec, self.pids)
        self.fit(spec["process"])

    def fit(self, process: dict[str, Any]) -> None:
        """What this agent has not it cannot give: capabilities that the host keeps from it, higher limits. And
        what it has it does not hand down: its own OOM score. (All capabilities are there in a user namespace.)"""
        for kind, names in process.get("capabilities", {}).items() if self.user is None else ():
            process["capabilities"][kind] = [name for name in names if self._has[name]]
        if self._limited:
            for limit in process.get("rlimits", []):
                _, hard = resource.getrlimit(getattr(resource, limit["type"]))
                if hard != resource.RLIM_INFINITY:
                    limit["hard"] = min(limit["hard"], hard)
                    limit["soft"] = min(limit["soft"], limit["hard"])
        wanted = process.get("oomScoreAdj", 0)
        process["oomScoreAdj"] = max(wanted, _oom_score()) if self._limited else wanted


def _permitted() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("CapPrm:"))


def _oom_score() -> int:
    with open("/proc/self/oom_score_adj") as file:
        return int(file.read())
