"""`python3 -I -S -m hyperpod.agent.main --guest` as PID 1, or `--host DIR` as a host process.

A host agent listens on DIR/1024.sock and DIR/1025.sock for uid 0, and ends by SIGTERM: its containers with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hyperpod.agent import messages
from hyperpod.agent.containers import Containers
from hyperpod.agent.environment import GuestPlace, Place, phase
from hyperpod.agent.listener import CONTROL_PORT, STDIO_PORT, Listener, listen_unix, listen_vsock
from hyperpod.agent.reaper import Reaper
from hyperpod.agent.service import AgentService, h2_factory
from hyperpod.agent.stdio import StdioConnection
from hyperpod.agent.tools import Tools
from hyperpod.errors import HyperpodError
from hyperpod.tasks import TaskOwner, report_on
from hyperpod.wire.preface import Identity

if TYPE_CHECKING:
    from hyperpod.agent.hostplace import HostOptions

log = logging.getLogger("hyperpod.agent")

MAX_CONTROL, MAX_STDIO = 16, 2048
"""Proven connections per port."""

CLOSE_TIMEOUT = 20.0
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


async def serve(host: HostOptions | None, listening: Mapping[int, socket.socket] | None = None) -> Place:
    """Run until Shutdown or SIGTERM. `host`: None in a guest. `listening`: sockets by port, if there are some."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    messages.evaluate_once()
    reaper = Reaper()
    place: Place
    processes = None
    if host is None:
        layout, cgroups = GuestPlace.prepare()
        place = GuestPlace(layout, ended)
    else:
        from hyperpod.agent.hostplace import HostPlace  # a guest's start does without

        layout, cgroups, processes = HostPlace.prepare(host)
        place = HostPlace(layout, ended, host)
        place.user = processes.user
        await HostPlace.clean(layout, cgroups)
        loop.add_signal_handler(signal.SIGTERM, place.end)
        report_on(signal.SIGUSR1)
        if processes.pids is not None:  # without it no container of the pod can be started any more
            reaper.watch(processes.pids.holder).add_done_callback(lambda _: place.end())
    owner = TaskOwner("agent", limit=16384)
    tools = Tools(layout, cgroups, reaper, owner, processes)
    tools.use(place.user)
    containers = Containers(tools)
    identity = Identity(claimable=lambda: len(containers) == 0)
    control = Listener(CONTROL_PORT, identity, h2_factory(AgentService(containers, place)), MAX_CONTROL)
    stdio = Listener(
        STDIO_PORT,
        identity,
        lambda: StdioConnection(containers.stream),
        MAX_STDIO,
    )
    if host is not None:
        stdio.uid = host.stdio_uid
    for listener in (stdio, control):
        port = listener.port
        if listening is not None:
            sock = listening[port]
        else:
            sock = listen_vsock(port) if host is None else listen_unix(host.directory, port, listener.uid)
        await listener.start(sock)
    phase("listening")
    await ended.wait()
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT):
            await containers.close()
    except (TimeoutError, HyperpodError) as exc:
        log.error("closing: %s", exc)
    control.close()
    stdio.close()
    await owner.close()
    if host is not None:
        cgroups.remove(layout.cgroup)
    reaper.close()
    # A second SIGTERM must not turn a clean end into a death by signal when the loop drops its handler.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    return place


def main_on_host(options: HostOptions, listening: Mapping[int, socket.socket] | None = None) -> int:
    """Until the agent is told to end, for who has forked it. Returns the process's exit code."""
    os.environ.setdefault("PATH", PATH)
    asyncio.run(serve(options, listening))
    return 0


def main(argv: list[str]) -> int:
    """Exit code of the process; a guest's never returns."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="hyperpod-agent: %(levelname).1s %(message)s"
    )
    os.environ.setdefault("PATH", PATH)
    if argv[:1] == ["--guest"]:
        asyncio.run(serve(None)).power_off()
    elif argv[:1] == ["--host"] and len(argv) == 2:
        from hyperpod.agent.hostplace import HostOptions

        return main_on_host(HostOptions(argv[1]))
    else:
        print("usage: --guest | --host DIR", file=sys.stderr)  # noqa: T201  # there is no other user interface
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
