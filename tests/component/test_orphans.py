"""The sweep ends a virtiofsd of an unknown domain, and nothing else. (QEMU's case: tests/vm/test_hypervisor.py.)"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hyperpod.hypervisor import orphans

VIRTIOFSD = shutil.which("virtiofsd", path="/usr/lib/qemu:/usr/libexec:/usr/bin") or "virtiofsd"


@contextlib.contextmanager
def virtiofsd(root: Path, domain: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real one, with the files that libvirt names after the domain."""
    stem = root / "run" / "qemu" / f"3-{domain}-fs0-fs"
    share = root / domain
    share.mkdir()
    sock = stem.with_suffix(".sock")
    argv = [VIRTIOFSD, f"--socket-path={sock}", "-o", f"source={share}", "-o", "sandbox=chroot"]
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    stem.with_suffix(".pid").write_text(f"{process.pid}\n")
    try:
        deadline = time.monotonic() + 30
        while not sock.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "run" / "qemu").mkdir(parents=True)
    return tmp_path


def test_only_the_unknown_domains_server_ends(root: Path) -> None:
    known = "hp-0123456789ab-cdefghijkl"  # libvirt cuts it
    with virtiofsd(root, known[:20]) as kept, virtiofsd(root, "hp-ffffffffffff") as orphan:
        swept = orphans.sweep(root, {known})
        assert [one.pid for one in swept] == [orphan.pid]
        assert orphan.wait(10) == -9
        assert kept.poll() is None
        assert orphans.sweep(root, {known}) == []
        assert kept.poll() is None
    assert list((root / "run" / "qemu").glob("*hp-fff*")) == []


def test_a_pid_file_that_points_at_something_else_harms_nobody(root: Path) -> None:
    stale = root / "run" / "qemu" / "1-hp-ffffffffffff-fs0-fs.pid"
    for text in (str(os.getpid()), "999999999", "garbage", ""):
        stale.write_text(text)
        assert orphans.sweep(root, set()) == []
