"""What the tests of VMs and of host pods do alike with a daemon: its client, and its death at every step."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path

from grpclib.exceptions import GRPCError, StreamTerminatedError

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import PATIENCE, Cri, Daemon

AGAIN = PATIENCE
"""Seconds for a killed daemon to be there again, and to have undone what the dead one has left."""

TRIES = 5
"""Lives that may end early by something else."""

LOST = (GRPCError, StreamTerminatedError, OSError, AssertionError)
"""What a call may raise when the daemon ends during it."""


@contextlib.asynccontextmanager
async def client_of(daemon: Daemon, handler: str = "") -> AsyncIterator[Cri]:
    """`handler`: of the pods that it makes."""
    async with daemon.client() as client:
        client.handler = handler
        yield client


@contextlib.asynccontextmanager
async def watched(daemon: Daemon, handler: str = "") -> AsyncIterator[Cri]:
    """A client with an image; nothing may be left when it has gone."""
    async with client_of(daemon, handler) as client:
        await client.load_busybox()
        yield client
    left = daemon.leftovers()
    assert left == [], f"left behind: {left}"


@contextlib.asynccontextmanager
async def leaving_nothing(daemon: Daemon, handler: str = "") -> AsyncIterator[Cri]:
    """A client of a shared daemon; what it leaves of pods that it has removed is a failure."""
    async with watched(daemon, handler) as client:
        try:
            yield client
        finally:
            await _remove_all(client)


async def numbers(client: Cri, container: str) -> list[int]:
    """Of the lines that it has logged so far, whose second word they are."""
    return [int(text.split()[1]) for _, _, text in await client.log(container)]


def reboot(daemon: Daemon, pod: str) -> None:
    """What a reboot of the host leaves of a daemon and its pod: the state folder, with the boot of before in it."""
    daemon.stop()
    while processes := daemon.processes():
        for line in processes:
            with contextlib.suppress(ProcessLookupError):  # one that ends with another
                os.kill(int(line.split()[0]), signal.SIGKILL)
        time.sleep(0.02)
    record = daemon.state / "sandboxes" / pod / "record.json"
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    record.write_text(record.read_text().replace(boot_id, "0" * len(boot_id)))
    daemon.unmount_namespaces()
    shutil.rmtree(daemon.run_dir)
    daemon.start()


async def _remove_all(client: Cri) -> None:
    for item in (await client.runtime.list_pod_sandbox(cri.ListPodSandboxRequest())).items:
        await client.remove_pod(item.id)


async def _undone(daemon: Daemon, handler: str) -> bool:
    with contextlib.suppress(*LOST):
        async with client_of(daemon, handler) as client:
            await _remove_all(client)
        return True
    return False


async def life(client: Cri, pod: str = "", mount: cri.Mount | None = None) -> None:
    """A pod's whole life, meeting every failpoint; `pod`: one that is there, else it makes its own."""
    pod = pod or await client.run_pod()
    mount = mount or cri.Mount(container_path="/logs", host_path=str(client.daemon.logs))
    container = await client.create(pod, "/bin/sh", "-c", "echo up; sleep 0.5", mounts=[mount])
    await client.runtime.update_container_resources(
        cri.UpdateContainerResourcesRequest(
            container_id=container, linux=cri.LinuxContainerResources(cpu_shares=512)
        )
    )
    await client.start(container)
    await client.wait(container)
    await client.runtime.remove_container(cri.RemoveContainerRequest(container_id=container))
    await client.remove_pod(pod)


async def _until_it_dies(daemon: Daemon, handler: str, one_life: Callable[[Cri], Awaitable[None]]) -> None:
    async def begin() -> None:
        async with client_of(daemon, handler) as client:
            await one_life(client)

    for _ in range(TRIES):
        # In a task of its own: grpclib's client may cancel its caller a moment after the connection has gone.
        [outcome] = await asyncio.gather(asyncio.create_task(begin()), return_exceptions=True)
        assert outcome is None or isinstance(outcome, (*LOST, asyncio.CancelledError)), outcome
        # Debian's bridge plugin fails now and then when another pod's veth has just left its bridge; a kubelet
        # would try again, too.
        if not (isinstance(outcome, GRPCError) and "CNI plugin" in str(outcome.message)):
            return


async def killed_at_every_step(
    daemon: Daemon,
    failpoints: Iterable[str],
    handler: str = "",
    one_life: Callable[[Cri], Awaitable[None]] = life,
) -> None:
    """Each failpoint ends the daemon once in a pod's life; the next one knows what to do, and nothing is left."""
    async with client_of(daemon, handler) as client:
        await client.load_busybox()
    for name in failpoints:
        daemon.stop()
        daemon.start(HYPERPOD_FAILPOINT=name)
        ready = daemon.text().count("ready on unix://")
        await _until_it_dies(daemon, handler, one_life)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(AGAIN):
                while daemon.text().count("ready on unix://") <= ready:
                    await asyncio.sleep(0.05)
        assert daemon.text().count("ready on unix://") > ready, f"{name} was never passed"
        # The next daemon has that failpoint before it, too, and may meet it while it undoes: then comes another.
        async with asyncio.timeout(AGAIN):
            while not await _undone(daemon, handler):
                await asyncio.sleep(0.1)
        async with client_of(daemon, handler) as client:
            assert (await client.runtime.list_containers(cri.ListContainersRequest())).containers == []
        assert daemon.leftovers() == [], name
