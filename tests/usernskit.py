"""Pods with a user namespace, as tests ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import Cri

BASE, LENGTH = 700_000, 65_536
POD = cri.NamespaceMode.POD


def mappings() -> list[cri.IdMapping]:
    return [cri.IdMapping(container_id=0, host_id=BASE, length=LENGTH)]


def userns() -> cri.UserNamespace:
    return cri.UserNamespace(mode=POD, uids=mappings(), gids=mappings())


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
