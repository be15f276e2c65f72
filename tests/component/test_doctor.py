"""The checks on a host that can run the component tests find what those need; what is missing gets its mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyperpod.errors import FailedPrecondition
from hyperpod.hypervisor.doctor import checks
from hyperpod.sandbox.host import find_crun


def test_this_host() -> None:
    found = {check.name: check for check in checks("tcg")}
    for name in (
        "root",
        "qemu-system-x86_64",
        "mkfs.ext4",
        "libvirt's QEMU driver",
        "user libvirt-qemu",
        "vsock",
    ):
        assert found[name].found, found[name]
    assert "tcg" in found["accelerator"].detail
    assert "no security boundary" in found["accelerator"].detail


def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    found = {check.name: check for check in checks("tcg")}
    check = found["mkfs.ext4"]
    assert (check.found, check.required, check.mend) == (False, True, "apt-get install e2fsprogs")
    assert all(check.mend for check in found.values() if not check.found)


def test_a_host_without_crun_is_told_before_a_pod_is_made(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="apt-get install crun"):
        find_crun(str(tmp_path))
    (tmp_path / "crun").touch(mode=0o755)
    assert find_crun(str(tmp_path)) == tmp_path / "crun"
