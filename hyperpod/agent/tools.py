"""What all containers of an agent share, and how any of their processes gets its streams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hyperpod.agent import envexec
from hyperpod.agent.cgroups import Cgroups
from hyperpod.agent.crun import Crun
from hyperpod.agent.layers import Layers
from hyperpod.agent.layout import Layout
from hyperpod.agent.process import ConsoleSocket, Pipes, ProcessIO, null_device
from hyperpod.agent.quota import Quota
from hyperpod.agent.reaper import Reaper
from hyperpod.agent.share import Share
from hyperpod.tasks import TaskOwner

if TYPE_CHECKING:
    from hyperpod.agent.hostplace import HostProcesses
    from hyperpod.agent.userns import PodUser


class Tools:
    """What every container uses."""

    def __init__(
        self,
        layout: Layout,
        cgroups: Cgroups,
        reaper: Reaper,
        owner: TaskOwner,
        host: HostProcesses | None = None,
    ) -> None:
        self.host = host
        self.user: PodUser | None = None
        self.layout, self.cgroups, self.reaper, self.owner = layout, cgroups, reaper, owner
        self.crun = Crun(layout, reaper)
        self.layers = Layers(layout)
        self.quota = Quota(layout)
        self.share = Share(layout)
        self._consoles = 0
        self._null = ""

    def use(self, user: PodUser | None) -> None:
        """The pod's user namespace, before the first container."""
        self.user = self.layers.user = user

    def console(self) -> ConsoleSocket:
        self._consoles += 1
        return ConsoleSocket(f"{self.layout.root}/t{self._consoles}")

    async def launch(
        self,
        io: ProcessIO,
        variables: envexec.Variables | None,
        user: dict[str, Any],
        call: Callable[[list[int], str | None], Any],
    ) -> tuple[int, asyncio.Future[int]]:
        """Run crun with the process's streams, for an OCI `user`; gives pid and exit code. When it fails, one that
        could not be given its `variables` may still be about to end, and nothing else is left."""
        self._null = self._null or null_device()
        pipes = Pipes(io, self._null, self.user.owner(user) if self.user else None)
        console = handover = None
        try:
            console = self.console() if io.tty else None
            handover = envexec.Handover(variables) if variables else None
            with self.reaper.adopting() as window:
                child = [*pipes.child, *(handover.child if handover else ())]
                pid = await call(child, console.path if console else None)
                exited = self.reaper.watch(pid, window)
            if handover is not None:
                await handover.confirm()
            if console is not None:
                io.attach_terminal(await console.receive())
            pipes.commit()
        finally:
            pipes.close()
            if console is not None:
                console.close()
            if handover is not None:
                handover.close()
        return pid, exited
