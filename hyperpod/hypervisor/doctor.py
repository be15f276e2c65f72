"""Host requirements as data: found or missing, and the one-line mend."""

from __future__ import annotations

import os
import pwd
import shutil
from dataclasses import dataclass
from pathlib import Path

from hyperpod.errors import HyperpodError
from hyperpod.hypervisor import accelerator

PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "skopeo": "skopeo",
    "sqfstar": "squashfs-tools",
    "mkfs.ext4": "e2fsprogs",
    "tc": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setpriv": "util-linux",
}
"""Program to Debian package."""

DRIVERS = "libvirt/connection-driver/libvirt_driver_qemu.so"


@dataclass(frozen=True)
class Check:
    """One requirement; `mend` is a command or a sentence."""

    name: str
    found: bool
    required: bool
    detail: str
    mend: str = ""


def checks(accelerator_setting: str) -> list[Check]:
    """Look at this host; changes nothing."""
    out = [Check("root", os.geteuid() == 0, True, f"uid {os.geteuid()}", "run as root")]
    for program, package in PROGRAMS.items():
        path = shutil.which(program)
        out.append(Check(program, path is not None, True, path or "not found", f"apt-get install {package}"))
    driver = next((p for p in Path("/usr/lib").glob(f"*/{DRIVERS}")), None)
    out.append(
        Check(
            "libvirt's QEMU driver",
            driver is not None,
            True,
            str(driver or "not found"),
            "apt-get install libvirt-daemon libvirt-daemon-driver-qemu",
        )
    )
    try:
        pwd.getpwnam("libvirt-qemu")
        user = True
    except KeyError:
        user = False
    mend = "useradd --system --no-create-home --shell /usr/sbin/nologin --user-group libvirt-qemu"
    out.append(
        Check("user libvirt-qemu", user, True, "libvirt's driver looks it up before its settings", mend)
    )
    try:
        choice = accelerator.probe(accelerator_setting)
        slow = "" if choice.kind == "kvm" else " (works, but slowly, and is no security boundary)"
        out.append(Check("accelerator", True, False, f"{choice.kind}: {choice.reason}{slow}"))
    except HyperpodError as exc:
        out.append(
            Check("accelerator", False, True, str(exc), "set vm.accelerator to auto, or mend /dev/kvm")
        )
    error = accelerator.device_error("/dev/vhost-vsock")
    detail = f"/dev/vhost-vsock: {error}; our own vhost-user device is used" if error else "the kernel's"
    out.append(Check("vsock", True, False, detail))
    return out
