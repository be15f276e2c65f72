"""An exec: one more process in a container that runs, by its id until it is removed."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any

from hyperpod.agent import envexec, security
from hyperpod.agent.ocispec import write_json
from hyperpod.agent.process import ProcessIO
from hyperpod.errors import HyperpodError, NotFound

if TYPE_CHECKING:
    from hyperpod.agent.container import Container
    from hyperpod.agent.tools import Tools


class Exec:
    """One more process in a container, in a cgroup of its own below the container's."""

    def __init__(self, ident: str, container: Container, *, tty: bool, stdin: bool) -> None:
        self.id, self.container = ident, container
        self.io = ProcessIO(tty=tty, stdin=stdin, ends_with_peer=True, eof_closes=True)
        self.exited: asyncio.Future[int] | None = None
        self.removed = asyncio.Event()

    @property
    def cgroup(self) -> str:
        return f"{self.container.cgroup}/{self.id}"

    async def start(self, tools: Tools, process: dict[str, Any]) -> int:
        """Gives the pid. Raises NotFound (no such program), FailedPrecondition."""
        process["terminal"] = self.io.tty
        process["user"] = self.container.user
        security.complete(process, self.container.environment)
        if tools.host is not None:
            tools.host.fit(process)
        async with self.container.starts:
            self.container.check_running()
            return await self._start(tools, process)

    async def _start(self, tools: Tools, process: dict[str, Any]) -> int:
        variables = envexec.take(process)
        path = f"{tools.layout.bundle(self.container.id)}/{self.id}"
        folder = self._open_workdir(process, 3 + (envexec.DESCRIPTORS if variables else 0))
        try:
            write_json(path, process)
            tools.cgroups.make_exec(self.container.id, self.id)
            pid, exited = await tools.launch(
                self.io,
                variables,
                process["user"],
                lambda child, console: tools.crun.exec(
                    self.container.id,
                    self.id,
                    path,
                    [*child, *folder],
                    console,
                    oom_score_adj=process.get("oomScoreAdj"),
                ),
            )
        except (HyperpodError, OSError):
            await tools.cgroups.kill(self.cgroup)
            tools.cgroups.remove(self.cgroup)
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            for fd in folder:
                os.close(fd)
        self.exited = exited
        exited.add_done_callback(lambda _: self.io.process_ended())
        return pid

    def _open_workdir(self, process: dict[str, Any], number: int) -> list[int]:
        """Have crun go to where descriptor `number` will be, not by the path, where that could lead it away."""
        from hyperpod.agent import workdir  # not needed before the first container

        container = self.container
        if not workdir.needs_care(container.namespaces, process["cwd"]):
            return []
        fd = workdir.open_in(container.first_process(), process["cwd"])
        process["cwd"] = f"/proc/self/fd/{number}"
        return [fd]

    async def wait(self) -> int:
        """The exit code. Raises NotFound when it is removed meanwhile."""
        assert self.exited is not None
        removed: asyncio.Future[object] = self.container.tools.owner.spawn(
            f"removed/{self.id}", self.removed.wait()
        )
        exited: asyncio.Future[object] = self.exited  # type: ignore[assignment]  # only waited for
        try:
            await asyncio.wait({exited, removed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            removed.cancel()
        if not self.exited.done():
            raise NotFound(f"exec {self.id} was removed")
        return self.exited.result()

    def leave(self, tools: Tools) -> bool:
        """Forget it; false when it left something in the background, which stays in its cgroup."""
        self.removed.set()
        self.io.close()
        if tools.cgroups.pids(self.cgroup):
            return False
        self.container.lost_oom_kills += tools.cgroups.oom_kills_to_be_lost(self.cgroup)
        tools.cgroups.remove(self.cgroup)
        return True

    async def remove(self, tools: Tools) -> None:
        """Kill what is left of it and forget it."""
        try:
            await tools.cgroups.kill(self.cgroup)
        finally:
            self.removed.set()
            self.io.close()
            self.container.lost_oom_kills += tools.cgroups.oom_kills_to_be_lost(self.cgroup)
            tools.cgroups.remove(self.cgroup)
