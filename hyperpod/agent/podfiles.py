"""Files that all containers of a pod share: /etc/resolv.conf, /etc/hosts, /etc/hostname.

They lie on a small tmpfs of their own: a container may write to them, and must not fill the agent's with it.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from hyperpod.agent import linux
from hyperpod.agent.layout import Layout

if TYPE_CHECKING:
    from hyperpod.agent.userns import PodUser

SIZE = 1 << 20
NAMES = ("resolv.conf", "hosts", "hostname")


def write(layout: Layout, resolv_conf: str, hosts: str, hostname: str) -> None:
    """Once per pod, before its first container. An empty text makes no file."""
    if not os.path.ismount(layout.pod_files):
        os.makedirs(layout.pod_files, exist_ok=True)
        safe = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
        linux.mount("tmpfs", layout.pod_files, "tmpfs", safe, f"mode=755,size={SIZE}")
    for name, text in zip(NAMES, (resolv_conf, hosts, hostname and f"{hostname}\n"), strict=True):
        if text:
            with open(f"{layout.pod_files}/{name}", "w") as file:
                file.write(text)


def give(layout: Layout, user: PodUser) -> None:
    """To the root of the pod's user namespace, who may write to them as any container's root."""
    for entry in os.scandir(layout.pod_files):
        user.own(entry.path)


def add_mounts(layout: Layout, spec: dict[str, Any]) -> None:
    """Bind them into a container, read-only when its root is; what the request mounts at a place wins.

    Below a mount that propagates they would cover the host's own, and stay there: that mount has the host's."""
    taken = {os.path.normpath(mount["destination"]) for mount in spec["mounts"]}
    shared = [f"{mount['destination']}/" for mount in spec["mounts"] if "rshared" in mount.get("options", ())]
    access = "ro" if spec["root"].get("readonly") else "rw"
    for name in NAMES:
        source, target = f"{layout.pod_files}/{name}", f"/etc/{name}"
        with contextlib.suppress(FileNotFoundError):
            os.stat(source)
            if target not in taken and not target.startswith(tuple(shared)):
                options = ["bind", "rprivate", access, "nosuid", "nodev", "noexec"]
                spec["mounts"].append(
                    {"destination": target, "type": "bind", "source": source, "options": options}
                )
