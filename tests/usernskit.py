"""Pods with a user namespace, as tests ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.wire.remotecommand import Wanted
from tests.daemonkit import BUSYBOX, Cri
from tests.streamkit import Command, exit_code, forwarded

BASE, LENGTH = 700_000, 65_536
POD, CONTAINER = cri.NamespaceMode.POD, cri.NamespaceMode.CONTAINER
OWN = {"pid": CONTAINER, "ipc": CONTAINER}
"""Namespace options: both the container's own. The kubelet's are pid CONTAINER and ipc POD."""


def mappings(base: int = BASE) -> list[cri.IdMapping]:
    return [cri.IdMapping(container_id=0, host_id=base, length=LENGTH)]


def userns(base: int = BASE) -> cri.UserNamespace:
    return cri.UserNamespace(mode=POD, uids=mappings(base), gids=mappings(base))


def context(**security: Any) -> cri.LinuxContainerConfig:
    """A container's, with the pod's user namespace; `namespaces` are its other namespace options."""
    options = cri.NamespaceOption(userns_options=userns(), **security.pop("namespaces", {}))
    return cri.LinuxContainerConfig(
        security_context=cri.LinuxContainerSecurityContext(namespace_options=options, **security)
    )


async def run_pod(client: Cri, *, privileged: bool = False, **linux: Any) -> str:
    security = cri.LinuxSandboxSecurityContext(
        namespace_options=cri.NamespaceOption(userns_options=userns()), privileged=privileged
    )
    return await client.run_pod(client.pod_config(security_context=security, **linux))


async def output(client: Cri, pod: str, script: str, **more: Any) -> list[str]:
    """Of both streams, as they come."""
    container = await client.sh(pod, f"exec 2>&1; {script}", **{"linux": context(), **more})
    await client.wait(container)
    return [text for _, _, text in await client.log(container)]


def volume(source: Path, **more: Any) -> cri.Mount:
    return cri.Mount(
        container_path="/v",
        host_path=str(source),
        uid_mappings=mappings(),
        gid_mappings=mappings(),
        **more,
    )


async def image_volume(client: Cri, pod: str) -> None:
    """Its files are the namespace's root's, and programs."""
    mount = cri.Mount(
        container_path="/i",
        image=cri.ImageSpec(image=BUSYBOX),
        readonly=True,
        uid_mappings=mappings(),
        gid_mappings=mappings(),
    )
    lines = await output(client, pod, "stat -c %u /i/bin/busybox; /i/bin/busybox echo runs", mounts=[mount])
    assert lines == ["0", "runs"]


async def streams(client: Cri, pod: str) -> None:
    """A terminal of a user's, and a forwarded port below 1024 that a container's root opened."""
    container = await client.sh(pod, "while :; do nc -l -p 81 -e cat; done", linux=context())
    request = cri.ExecRequest(
        container_id=container, cmd=["sh", "-c", "tty; id -u; stty size"], stdin=True, stdout=True, tty=True
    )
    wanted = Wanted(stdin=True, stdout=True, stderr=False, tty=True)
    command = await Command.open((await client.runtime.exec(request)).url, wanted)
    out, _, status = await command.result()
    assert exit_code(status) == 0, out
    assert out.split()[:2] == [b"/dev/pts/0", b"0"], out
    url = (await client.runtime.port_forward(cri.PortForwardRequest(pod_sandbox_id=pod))).url
    assert await forwarded(url, 81, b"through") == b"through"
