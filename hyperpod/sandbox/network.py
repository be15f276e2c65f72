"""The network of each sandbox: namespace, CNI attachment and taps, made in this order and undone in reverse.

`network.json` in the sandbox's record folder is written before ADD and again with each plugin's result, so DEL
always knows what ADD used and gave, after a crash, a change of the configuration, or a reboot. It goes when DEL has
succeeded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from pydantic import ValidationError

from hyperpod import failpoints
from hyperpod.config import NetworkConfig
from hyperpod.errors import NetworkError
from hyperpod.model.network import Attachment, CniResult, GuestInterface, PodNetwork
from hyperpod.model.sandbox import SandboxRecord
from hyperpod.network import links, ports, tap
from hyperpod.network.cni import Cni
from hyperpod.network.confdir import ConfDir
from hyperpod.network.netns import Namespaces
from hyperpod.spec import cnitemplate, podnet
from hyperpod.store.records import write_atomic

log = logging.getLogger(__name__)

FILE = "network.json"
FILLED = "10-hyperpod-net.conflist"
"""Made of the template, in the folder of the conflists."""

CHECKS_AT_ONCE = 2
"""After a restart every pod's is due, and nobody waits for it: new pods' plugins go first."""


class PodNetworks:
    """`folder` gives the record folder of a sandbox's id. Every coroutine raises hyperpod errors only."""

    def __init__(self, config: NetworkConfig, run_dir: Path, folder: Callable[[str], Path]) -> None:
        conf = ConfDir(config.conf_dir, config.bin_dirs)
        self.cni = Cni(conf, config.plugin_timeout, run_dir / "plugins")
        self.namespaces = Namespaces(run_dir)
        self._config, self._folder = config, folder
        self._checks = asyncio.Semaphore(CHECKS_AT_ONCE)

    async def attach(
        self, record: SandboxRecord, *, vm: bool = True, netns: Path | None = None
    ) -> PodNetwork:
        """Make the namespace and let the plugins fill it. A failure leaves things: call `detach` then.

        `vm`: the interfaces are found out, for a guest to get the same. `netns`: made already."""
        network = self.cni.conf.current()
        ports.need_free(podnet.host_ports(record.config))
        runtime = podnet.runtime(record.config)
        for capability in ("portMappings", "bandwidth"):
            if capability in runtime and not network.has(capability):
                log.warning(
                    "sandbox %s asks for %s, which no plugin of %s has",
                    record.id[:12], capability, network.source,
                )  # fmt: skip
        netns = netns or await self.namespaces.make(record.id)
        failpoints.passing("sandbox.netns")
        attachment = Attachment(
            source=network.source,
            conflist=network.text,
            container_id=record.id,
            netns=str(netns),
            args=podnet.arguments(record.config, record.id),
            runtime=podnet.runtime_json(record.config),
            added=0,
        )
        await self._write(record.id, attachment)
        # For this boot only: whatever needs it (rules, links) ends with the host.
        attachment, result = await self.cni.add(
            attachment, lambda one: self._write(record.id, one, durable=False)
        )
        failpoints.passing("sandbox.cni")
        await self._write(record.id, attachment)
        addresses = _addresses(result, attachment.ifname)
        if not addresses:
            raise NetworkError(f"the plugins of {network.source} gave {attachment.ifname} no address")
        interfaces: tuple[GuestInterface, ...] = ()
        if vm:
            interfaces = await self.namespaces.run(netns, lambda: links.read_interfaces(record.id))
        failpoints.passing("sandbox.network")
        return PodNetwork(name=network.name, addresses=addresses, interfaces=interfaces)

    async def plug(self, record: SandboxRecord, network: PodNetwork) -> None:
        """The domain runs: join its taps to the interfaces."""
        path = str(self.namespaces.path(record.id))
        await tap.connect(self.namespaces, path, network.interfaces)
        failpoints.passing("sandbox.tap")

    async def detach(self, sandbox_id: str, folder: Path | None = None) -> None:
        """Undo all of it; safe to repeat, and fine when nothing is there. `folder`: of a record that was moved.

        Raises NetworkError when DEL fails: then everything is kept for the next try."""
        file = (folder or self._folder(sandbox_id)) / FILE
        if (attachment := await asyncio.to_thread(_read, file)) is not None:
            alive = self.namespaces.alive(attachment.netns)
            try:
                await self.cni.delete(attachment, netns=attachment.netns if alive else "")
            except NetworkError as exc:
                raise NetworkError(f"the pod's network cannot be removed, stop the pod again: {exc}") from exc
            failpoints.passing("sandbox.unplugged")
        await self.namespaces.remove(sandbox_id)
        await asyncio.to_thread(file.unlink, missing_ok=True)

    def connected(self, sandbox_id: str) -> bool:
        """Whether its namespace is there: without it, as when somebody has removed it, nobody reaches the pod."""
        return self.namespaces.alive(str(self.namespaces.path(sandbox_id)))

    async def use_pod_cidr(self, pod_cidr: str) -> None:
        """Fill the template with the node's networks, unless another add-on's network is ready.

        Raises InvalidArgument for what is no network, NetworkError for a template that cannot be used."""
        cidrs, template = cnitemplate.networks(pod_cidr), self._config.conf_template
        if template is None or not cidrs:
            return
        target = self._config.conf_dir / FILLED
        with contextlib.suppress(NetworkError):
            if (other := self.cni.conf.current().source) != str(target):
                log.info("%s is in use: the pod networks %s go into no conflist", other, pod_cidr)
                return
        try:
            text = cnitemplate.fill(str(template), template.read_text(), cidrs)
            target.parent.mkdir(parents=True, exist_ok=True)
            await asyncio.to_thread(write_atomic, target, text.encode(), 0o644)
        except (OSError, UnicodeDecodeError) as exc:
            raise NetworkError(f"network.conf_template {template}: {exc}") from exc

    async def check(self, sandbox_id: str) -> None:
        """CHECK of a running pod. Raises NetworkError that says what is not as it was made."""
        async with self._checks:
            if (attachment := await asyncio.to_thread(_read, self._folder(sandbox_id) / FILE)) is not None:
                await self.cni.check(attachment)

    async def sweep(self, known: Iterable[str]) -> None:
        """Remove namespaces of sandboxes that have no record."""
        kept = {sandbox_id[:12] for sandbox_id in known}
        for short in self.namespaces.known():
            if short not in kept:
                log.warning("network namespace %s belongs to no sandbox; removing it", short)
                await self.namespaces.remove(short)

    async def _write(self, sandbox_id: str, attachment: Attachment, *, durable: bool = True) -> None:
        data = attachment.model_dump_json().encode()
        await asyncio.to_thread(write_atomic, self._folder(sandbox_id) / FILE, data, durable=durable)


def _read(path: Path) -> Attachment | None:
    with contextlib.suppress(FileNotFoundError):
        try:
            return Attachment.model_validate_json(path.read_bytes())
        except ValidationError as exc:
            log.error("%s is damaged, so no plugin can be told to clean up: %s", path, exc)
    return None


def _addresses(result: CniResult, ifname: str) -> tuple[str, ...]:
    """The first IPv4 address leads, as with other runtimes; the kubelet puts them into the node's order itself."""
    found = result.addresses(ifname)
    return tuple(sorted(found, key=lambda address: ":" in address))
