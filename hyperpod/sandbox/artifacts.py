"""The guest kernel and root image that new VMs start with.

Each lies in a folder with a manifest.json (written by kernel/ and images/). A record keeps what its VM runs,
so an upgrade of the folders changes new VMs only.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hyperpod.errors import FailedPrecondition
from hyperpod.model.sandbox import Artifact, VmSize


def _manifest(folder: Path, kind: str, setting: str) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        data = json.loads(path.read_text())
    except OSError as exc:
        raise FailedPrecondition(
            f"no guest {kind} at {path} ({exc.strerror}); build it or set {setting}"
        ) from exc
    except ValueError as exc:
        raise FailedPrecondition(f"{path} is damaged: {exc}; build the guest {kind} again") from exc
    if not isinstance(data, dict) or data.get("kind") != kind:
        raise FailedPrecondition(f"{path} does not describe a guest {kind}; check {setting}")
    return data


def _file(folder: Path, name: object, kind: str) -> str:
    path = (folder / str(name)).resolve()
    if not path.is_file():
        raise FailedPrecondition(f"the guest {kind} {path} is missing; build it again")
    return str(path)


def kernel(folder: Path) -> Artifact:
    """The guest kernel in `folder`. Raises FailedPrecondition that says how to mend it."""
    data = _manifest(folder, "kernel", "vm.kernel")
    return Artifact(
        version=str(data.get("version", "")),
        path=_file(folder, data.get("kernel"), "kernel"),
        initrd=_file(folder, data["initrd"], "kernel") if data.get("initrd") else "",
        cmdline=str(data.get("cmdline", "")),
    )


def patches_itself(folder: Path) -> bool:
    """Whether the guest kernel in `folder` rewrites its own code while it runs, which emulated CPUs bear only one
    at a time. Raises FailedPrecondition."""
    return _manifest(folder, "kernel", "vm.kernel").get("patches_itself") is not False


def guest(folder: Path) -> Artifact:
    """The guest root image in `folder`. Raises FailedPrecondition that says how to mend it."""
    data = _manifest(folder, "guest", "vm.guest")
    return Artifact(
        version=str(data.get("version", "")),
        path=_file(folder, data.get("root"), "root image"),
        cmdline=str(data.get("cmdline", "")),
        fstype=str(data.get("fstype", "")),
    )


def host_kernel() -> Artifact:
    """What host pods run on."""
    return Artifact(version=os.uname().release, path="")


def host_size() -> VmSize:
    """What this host has: the most that a host pod can have."""
    memory, cpus = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20, os.cpu_count() or 1
    return VmSize(
        memory_mib=memory, vcpus=cpus, max_memory_mib=memory, max_vcpus=cpus, reason="the host's own"
    )
