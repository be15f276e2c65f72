"""The host's cgroup trees that a pod's processes are in."""

from __future__ import annotations

import contextlib
from pathlib import Path

from hyperpod.sandbox.cgroup import mounted

USED = [h for h in mounted() if "devices" not in h.controllers]
"""In that of `devices` libvirt moves QEMU about."""


def cgroups_of(pid: int) -> set[str]:
    """The distinct ones of all its threads, in USED."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # QEMU's workers come and go
            for line in (task / "cgroup").read_text().splitlines():
                _, controllers, path = line.split(":", 2)
                if controllers != "devices":
                    found.add(path)
    return found
