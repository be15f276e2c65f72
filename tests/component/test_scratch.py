"""Scratch disks by real mkfs: whole, private, sparse, and nothing left of a failure."""

from __future__ import annotations

import asyncio
import stat
import subprocess
from pathlib import Path

import pytest

from hyperpod.errors import HyperpodError
from hyperpod.hypervisor.scratch import ScratchDisks

UID = 1_700_002


def features(path: Path) -> str:
    return subprocess.run(["dumpe2fs", "-h", path], capture_output=True, text=True, check=True).stdout


async def test_a_disk_is_whole_private_and_sparse(tmp_path: Path) -> None:
    disks = ScratchDisks(tmp_path)
    path = disks.root / "one.raw"
    await disks.create(path, 1024, UID, UID)
    found = path.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o600, UID, UID)
    assert found.st_size == 1024 << 20
    assert found.st_blocks * 512 < 8 << 20
    subprocess.run(["e2fsck", "-fn", path], check=True, capture_output=True)
    text = features(path)
    assert "has_journal" not in text
    assert {"quota", "project"} <= set(text.split())
    assert "Project quota inode" in text
    await disks.remove(path)
    await disks.remove(path)
    assert not path.exists()


async def test_disks_made_at_once_share_one_template(tmp_path: Path) -> None:
    disks = ScratchDisks(tmp_path)
    paths = [disks.root / f"{n}.raw" for n in range(8)]
    await asyncio.gather(*(disks.create(path, 64, UID + n, UID) for n, path in enumerate(paths)))
    assert [path.stat().st_uid for path in paths] == [UID + n for n in range(8)]
    (template,) = (p for p in disks.root.iterdir() if p.name.startswith("template"))
    assert all(path.read_bytes() == template.read_bytes() for path in paths)
    assert stat.S_IMODE(template.stat().st_mode) == 0o600


async def test_a_template_cut_short_by_a_crash_is_made_again(tmp_path: Path) -> None:
    disks = ScratchDisks(tmp_path)
    disks.root.mkdir()
    (disks.root / ".template-64.tmp").write_bytes(b"half")
    await disks.create(disks.root / "a.raw", 64, UID, UID)
    subprocess.run(["e2fsck", "-fn", disks.root / "a.raw"], check=True, capture_output=True)
    assert sorted(p.name for p in disks.root.iterdir() if p.name.startswith(".")) == []


async def test_failures_leave_nothing_and_say_why(tmp_path: Path) -> None:
    disks = ScratchDisks(tmp_path)
    with pytest.raises(HyperpodError, match="No such file or directory"):
        await disks.create(tmp_path / "missing" / "a.raw", 64, UID, UID)
    with pytest.raises(HyperpodError, match=r"mkfs\.ext4 failed"):
        await disks.create(disks.root / "b.raw", 0, UID, UID)
    assert [p.name for p in disks.root.iterdir() if not p.name.startswith("template")] == []


async def test_a_predecessors_disk_is_not_reused(tmp_path: Path) -> None:
    disks = ScratchDisks(tmp_path)
    path = disks.root / "a.raw"
    await disks.create(path, 64, UID, UID)
    with path.open("r+b") as file:
        file.seek(32 << 20)
        file.write(b"another tenant's data")
    await disks.create(path, 64, UID + 1, UID)
    with path.open("rb") as file:
        file.seek(32 << 20)
        assert file.read(21) == bytes(21)
    assert path.stat().st_uid == UID + 1
