"""Composition root: makes every part, joins them, serves, and lets go in order.

Started by the supervisor (`hyperpod serve`) and restarted by it; the pods do not notice.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from hyperpod import __version__, logs
from hyperpod.config import Config
from hyperpod.container.execsync import ExecRunner
from hyperpod.container.known import KnownContainers
from hyperpod.container.manager import ContainerManager
from hyperpod.container.seccomp import SeccompProfiles
from hyperpod.container.stats import StatsCollector
from hyperpod.cri.admin_service import AdminService
from hyperpod.cri.image_service import ImageService
from hyperpod.cri.ports import Ports
from hyperpod.cri.runtime_service import RuntimeService
from hyperpod.cri.stats import StatsReader
from hyperpod.daemon_args import arguments, config_of
from hyperpod.errors import FailedPrecondition, HyperpodError
from hyperpod.hypervisor.libvirt import LibvirtHypervisor
from hyperpod.hypervisor.scratch import ScratchDisks
from hyperpod.image.settings import ImageSettings
from hyperpod.image.store import ImageStore
from hyperpod.model.container import ContainerRecord, ContainerStatus
from hyperpod.model.sandbox import SandboxRecord, SandboxStatus
from hyperpod.recovery import Recovery
from hyperpod.rpc.server import RpcServer
from hyperpod.sandbox.boot import VmBuilder
from hyperpod.sandbox.builder import Common
from hyperpod.sandbox.cgroup import SandboxCgroups
from hyperpod.sandbox.host import HostBuilder
from hyperpod.sandbox.manager import SandboxManager, host_boot_id
from hyperpod.sandbox.network import PodNetworks
from hyperpod.store.records import RecordStore, write_atomic
from hyperpod.streaming.streams import Streams
from hyperpod.supervisor.client import SupervisorClient
from hyperpod.tasks import TaskOwner, report_on

log = logging.getLogger(__name__)

DRAIN = 10.0
"""Seconds that running RPCs get when the daemon ends."""


def instance_id(state_dir: Path) -> str:
    """What makes domains ours: made once per state folder."""
    path = state_dir / "instance-id"
    with contextlib.suppress(FileNotFoundError):
        return path.read_text().strip()
    ident = secrets.token_hex(8)
    write_atomic(path, ident.encode(), mode=0o644)
    return ident


@contextlib.contextmanager
def only_one(state_dir: Path) -> Any:
    """Raises FailedPrecondition when another daemon holds this state folder."""
    fd = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as exc:
        raise FailedPrecondition(
            f"another hyperpod daemon uses {state_dir}; give --state-dir another"
        ) from exc
    finally:
        os.close(fd)


def notify(message: str) -> None:
    """systemd's readiness protocol (sd_notify(3)); nothing without NOTIFY_SOCKET."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(message.encode(), "\0" + path[1:] if path.startswith("@") else path)


def image_settings(config: Config) -> ImageSettings:
    """The image component's own settings out of the configuration."""
    return ImageSettings(
        layer_gid=config.vm.uid_base,
        mirror=config.image.mirror,
        insecure_registries=config.image.insecure_registries,
        max_concurrent_pulls=config.image.max_concurrent_pulls,
        stall_timeout=config.image.stall_timeout,
    )


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[RpcServer]:
    """Everything up, recovered and listening; on leaving, everything let go, the pods untouched."""
    boot_id = host_boot_id()
    async with AsyncExitStack() as stack:
        owner = TaskOwner("daemon")
        supervisor = SupervisorClient(str(config.run_dir / "supervisor.sock"))
        await supervisor.connect(timeout=10.0)
        stack.push_async_callback(supervisor.close)
        ident = instance_id(config.state_dir)
        hypervisor = LibvirtHypervisor(
            run_dir=config.run_dir,
            instance_id=ident,
            uri=config.vm.libvirt_uri,
            accelerator=config.vm.accelerator,
        )
        await hypervisor.open()
        stack.push_async_callback(hypervisor.close)
        images = ImageStore(config.state_dir, config.run_dir, image_settings(config))
        await images.open()
        stack.push_async_callback(images.close)
        records = RecordStore(config.state_dir, "sandboxes", SandboxRecord, SandboxStatus)
        networks = PodNetworks(config.network, config.run_dir, records.folder)
        common = Common(config, supervisor, networks, SandboxCgroups())
        vms = VmBuilder(common, hypervisor, ScratchDisks(config.state_dir), instance_id=ident)
        sandboxes = SandboxManager(config, records, vms, HostBuilder(common), owner, boot_id=boot_id)
        container_records = RecordStore(config.state_dir, "containers", ContainerRecord, ContainerStatus)
        known = KnownContainers(container_records, sandboxes, images)
        containers = ContainerManager(known, SeccompProfiles(config.container), owner)
        sandboxes.listen(containers.lives)
        stack.push_async_callback(owner.close)
        stack.push_async_callback(sandboxes.detach)
        streams = Streams(config, sandboxes, known)
        await streams.listen()
        stack.push_async_callback(streams.close)
        await Recovery(sandboxes, known, supervisor).run()
        await images.collect()
        collector = StatsCollector(owner, lambda sandbox: sandboxes.builder(sandbox).scratch_bytes(sandbox))
        ports = Ports(
            sandboxes=sandboxes,
            containers=containers,
            execs=ExecRunner(known, owner),
            streams=streams,
            images=images,
            networks=networks,
            stats=StatsReader(sandboxes, known, collector, config.state_dir),
            userns=sandboxes.userns,
        )
        server = RpcServer(
            [RuntimeService(ports, config, hypervisor), ImageService(ports, config), AdminService(ports)]
        )
        await server.listen(config.socket_path)
        stack.push_async_callback(server.close, DRAIN)
        yield server


async def serve(config: Config) -> None:
    """Until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    report_on(signal.SIGUSR1)
    async with running(config):
        notify("READY=1")
        log.info("hyperpod %s ready on unix://%s", __version__, config.socket_path)
        await stop.wait()
        notify("STOPPING=1")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hyperpod serve")
    arguments(parser)
    try:
        config = config_of(parser.parse_args(argv))
        logs.setup(config.log_level, "daemon")
        config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o711)
        with only_one(config.state_dir):
            asyncio.run(serve(config))
    except HyperpodError as exc:
        print(f"hyperpod: {exc}", file=sys.stderr)  # noqa: T201  the user's terminal, before or after logging
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
