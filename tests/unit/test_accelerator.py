"""KVM only where it can work; the reason is always told."""

from __future__ import annotations

import pytest

from hyperpod.errors import FailedPrecondition
from hyperpod.hypervisor.accelerator import decide, device_error, probe

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


@pytest.mark.parametrize("setting", ["auto", "kvm"])
def test_a_device_closed_to_qemus_users_is_told_not_replaced_by_emulation(setting: str) -> None:
    with pytest.raises(FailedPrecondition, match=r"mode 0660.*chmod 0666.*udev"):
        decide(setting, kvm_error="", cpuinfo=WITH, kvm_mode=0o660)
    assert decide("tcg", kvm_error="", cpuinfo=WITH, kvm_mode=0o660).kind == "tcg"


def test_a_device_that_is_not_used_need_not_be_open() -> None:
    assert decide("auto", kvm_error="", cpuinfo=WITHOUT, kvm_mode=0o600).kind == "tcg"


def test_devices_are_tried() -> None:
    assert device_error("/dev/null") == ""
    assert device_error("/nonexistent") == "No such file or directory"


def test_this_host_gets_an_answer_with_a_reason() -> None:
    got = probe("tcg")
    assert (got.kind, got.reason) == ("tcg", "vm.accelerator is tcg")
