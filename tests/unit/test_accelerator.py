"""KVM only where it can work; the reason is always told."""

from __future__ import annotations

import pytest

from hyperpod.errors import FailedPrecondition
from hyperpod.hypervisor.accelerator import decide

WITH, WITHOUT = "flags\t\t: fpu vmx sse\n", "flags\t\t: fpu sse vmx_not\n"


@pytest.mark.parametrize(
    ("setting", "error", "cpu", "kind", "word"),
    [
        ("auto", "", WITH, "kvm", "extension"),
        ("auto", "", "flags : svm\n", "kvm", "extension"),
        ("auto", "", WITHOUT, "tcg", "neither vmx nor svm"),
        ("auto", "Permission denied", WITH, "tcg", "Permission denied"),
        ("tcg", "", WITH, "tcg", "vm.accelerator"),
        ("kvm", "", WITHOUT, "kvm", "vm.accelerator"),
    ],
)
def test_decisions(setting: str, error: str, cpu: str, kind: str, word: str) -> None:
    got = decide(setting, kvm_error=error, cpuinfo=cpu)
    assert got.kind == kind
    assert word in got.reason


def test_forced_kvm_without_a_device() -> None:
    with pytest.raises(FailedPrecondition, match="No such file"):
        decide("kvm", kvm_error="No such file or directory", cpuinfo=WITH)
