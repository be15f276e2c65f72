"""KVM or emulation. A /dev/kvm that opens is not enough: on hosts that are themselves paravirtualised guests it
does, and then hangs every stock kernel. So KVM is used only where the CPU shows vmx or svm, or when forced."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from hyperpod.errors import FailedPrecondition

_FLAGS = re.compile(r"^flags\s*:.*\b(vmx|svm)\b", re.MULTILINE)


@dataclass(frozen=True)
class Accelerator:
    """`kind` is kvm or tcg; `reason` is for people."""

    kind: str
    reason: str


def decide(setting: str, *, kvm_error: str, cpuinfo: str) -> Accelerator:
    """Pure decision. `kvm_error` is empty when /dev/kvm opened. Raises FailedPrecondition for a forced KVM."""
    if setting == "tcg":
        return Accelerator("tcg", "vm.accelerator is tcg")
    if kvm_error:
        if setting == "kvm":
            raise FailedPrecondition(f"vm.accelerator is kvm, but /dev/kvm: {kvm_error}")
        return Accelerator("tcg", f"/dev/kvm: {kvm_error}")
    if setting == "kvm":
        return Accelerator("kvm", "vm.accelerator is kvm")
    if not _FLAGS.search(cpuinfo):
        return Accelerator("tcg", "/dev/kvm opens, but the CPU shows neither vmx nor svm (a nested host)")
    return Accelerator("kvm", "/dev/kvm opens and the CPU has the extension")


def probe(setting: str) -> Accelerator:
    """Decide for this host. Raises FailedPrecondition when KVM is forced and cannot be used by QEMU's users."""
    error = ""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        error = exc.strerror or str(exc)
    choice = decide(setting, kvm_error=error, cpuinfo=Path("/proc/cpuinfo").read_text())
    if choice.kind == "kvm" and not stat.S_IMODE(Path("/dev/kvm").stat().st_mode) & 0o006 == 0o006:
        raise FailedPrecondition(
            "/dev/kvm is not open to the users that QEMU runs as; `chmod 0666 /dev/kvm` (udev's default today)"
        )
    return choice
