"""KVM or emulation. A /dev/kvm that opens is not enough: on hosts that are themselves paravirtualised guests it
does, and then hangs every stock kernel. So KVM is used only where the CPU shows vmx or svm, or when forced."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from hyperpod.errors import FailedPrecondition

KVM = "/dev/kvm"
OPEN_TO_ALL = 0o006

_FLAGS = re.compile(r"^flags\s*:.*\b(vmx|svm)\b", re.MULTILINE)


@dataclass(frozen=True)
class Accelerator:
    """`kind` is kvm or tcg; `reason` is for people."""

    kind: str
    reason: str


def decide(setting: str, *, kvm_error: str, cpuinfo: str, kvm_mode: int = 0o666) -> Accelerator:
    """Pure decision for `setting` auto, kvm or tcg.

    `kvm_error` is empty when /dev/kvm opened; `kvm_mode` are its permission bits. Raises FailedPrecondition when
    KVM is to be used and cannot be: forced without a device, or not open to the users that QEMU runs as. The
    latter is not mended by emulation in silence: that is slower by ten, and no boundary between tenants.
    """
    if setting == "tcg":
        return Accelerator("tcg", "vm.accelerator is tcg")
    if kvm_error:
        if setting == "kvm":
            raise FailedPrecondition(f"vm.accelerator is kvm, but {KVM}: {kvm_error}")
        return Accelerator("tcg", f"{KVM}: {kvm_error}")
    if setting == "auto" and not _FLAGS.search(cpuinfo):
        return Accelerator("tcg", f"{KVM} opens, but the CPU shows neither vmx nor svm (a nested host)")
    if kvm_mode & OPEN_TO_ALL != OPEN_TO_ALL:
        raise FailedPrecondition(
            f"{KVM} (mode {kvm_mode:04o}) is not open to the users that QEMU runs as: `chmod 0666 {KVM}`, and"
            ' for every boot a udev rule KERNEL=="kvm", MODE="0666"; or set vm.accelerator to tcg'
        )
    if setting == "kvm":
        return Accelerator("kvm", "vm.accelerator is kvm")
    return Accelerator("kvm", f"{KVM} opens and the CPU has the extension")


def device_error(path: str) -> str:
    """Why a device cannot be opened for reading and writing; empty when it can."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return exc.strerror or str(exc)
    return ""


def probe(setting: str) -> Accelerator:
    """Decide for this host. Raises FailedPrecondition as `decide` does."""
    error = device_error(KVM)
    mode = 0 if error else stat.S_IMODE(Path(KVM).stat().st_mode)
    return decide(setting, kvm_error=error, cpuinfo=Path("/proc/cpuinfo").read_text(), kvm_mode=mode)
