"""SupervisorClient: the daemon's side of the supervisor's socket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hyperpod.errors import ProtocolError
from hyperpod.shim.caller import ControlCaller

SPAWN = 20.0
"""Seconds; the supervisor gives a shim 15 to listen."""
CALL = 10.0


class ShimProcess(NamedTuple):
    """`start_time`: clock ticks since boot; with the pid, the process's identity. pid 0: it is dead."""

    sandbox_id: str
    pid: int
    start_time: int


class SupervisorClient:
    """Every method raises Unavailable when the supervisor is gone, DeadlineExceeded when it does not answer."""

    def __init__(self, path: str) -> None:
        """`path`: <run_dir>/supervisor.sock."""
        self._caller = ControlCaller(path, "supervisor")

    async def connect(self, timeout: float) -> None:
        await self._caller.connect(timeout)

    async def close(self) -> None:
        await self._caller.close()

    async def spawn_shim(
        self,
        *,
        sandbox_id: str,
        directory: str,
        uid: int,
        gid: int,
        cid: int = 3,
        device: bool = True,
        resume: bool = False,
        cgroup: Sequence[str] = (),
    ) -> ShimProcess:
        """Fork a shim; returns when it listens. One of the same sandbox that still lives is killed first.

        `resume`: it gets what its predecessor stored. Raises Unavailable when it ends at its start.
        """
        args = {
            "sandbox_id": sandbox_id,
            "directory": directory,
            "uid": uid,
            "gid": gid,
            "cid": cid,
            "device": device,
            "resume": resume,
            "cgroup": list(cgroup),
        }
        fields = await self._caller.call("spawn_shim", args, timeout=SPAWN)
        return ShimProcess(sandbox_id, int(fields["pid"]), int(fields["start_time"]))

    async def spawn_agent(
        self,
        *,
        directory: str,
        scratch: str,
        cgroup_path: str,
        netns: str,
        uts: bool,
        ipc: bool,
        pid: bool,
        uids: str,
        gids: str,
        stdio_uid: int,
        crun_version: str,
        cgroup: Sequence[str],
    ) -> tuple[int, int]:
        """Fork a host agent (HostOptions has what the arguments mean) into the folders `cgroup`; gives its pid and
        start time. It listens soon after. Raises Unavailable when it cannot be forked."""
        args = {
            "directory": directory,
            "scratch": scratch,
            "cgroup_path": cgroup_path,
            "netns": netns,
            "uts": uts,
            "ipc": ipc,
            "pid": pid,
            "uids": uids,
            "gids": gids,
            "stdio_uid": stdio_uid,
            "crun_version": crun_version,
            "cgroup": list(cgroup),
        }
        fields = await self._caller.call("spawn_agent", args, timeout=SPAWN)
        return int(fields["pid"]), int(fields["start_time"])

    async def drop(self, sandbox_id: str) -> None:
        """End the sandbox's shim and forget what it stored; unknown ones are fine. Returns when it is gone."""
        await self._caller.call("drop", {"sandbox_id": sandbox_id}, timeout=CALL)

    async def list(self) -> list[ShimProcess]:
        """Every shim that lives or has left something."""
        found: list[ShimProcess] = []
        while True:
            after = found[-1].sandbox_id if found else ""
            rows = (await self._caller.call("list", {"after": after}, timeout=CALL)).get("shims")
            if not isinstance(rows, list):
                raise ProtocolError("supervisor: list without shims")
            if not rows:
                return found
            found += (ShimProcess(*row) for row in rows)

    async def list_ids(self) -> set[str]:
        return {shim.sandbox_id for shim in await self.list()}
