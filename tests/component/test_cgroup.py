"""Cgroups of sandboxes on this host's own cgroup trees, with real processes."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.config import Config
from hyperpod.cri.runtime_service import RuntimeService
from hyperpod.errors import InvalidArgument
from hyperpod.sandbox.cgroup import SandboxCgroups, mounted, qemu_pid
from hyperpod.spec.cgroup import Hierarchy, sandbox_folder
from tests import runs
from tests.cgroupkit import USED, cgroups_of

MOUNTED = mounted()
NOWHERE: Any = None
V2 = [h for h in MOUNTED if h.unified]


def new_id() -> str:
    return secrets.token_hex(32)


@pytest.fixture
def parent() -> Iterator[str]:
    """A pod's cgroup, as the kubelet makes it."""
    name = f"/hyperpod-test-{secrets.token_hex(4)}"
    runs.record("cgroup", name.lstrip("/"))
    for hierarchy in MOUNTED:
        Path(hierarchy.mount + name).mkdir()
    yield name
    for hierarchy in MOUNTED:
        Path(hierarchy.mount + name).rmdir()


@asynccontextmanager
async def sleeper(name: str = "") -> AsyncIterator[Process]:
    """A process with a second thread, named as QEMU is."""
    code = "import sys,threading,time; threading.Thread(target=time.sleep,args=(600,)).start(); print(1,flush=True)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, "-name", f"guest={name},debug-threads=on", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    await process.stdout.readline()
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def folders(path: str) -> list[Path]:
    return [Path(h.mount + path) for h in MOUNTED if Path(h.mount + path).exists()]


@pytest.mark.parametrize("found", [MOUNTED, V2], ids=["all", "v2"])
async def test_made_filled_and_removed(found: Sequence[Hierarchy], parent: str) -> None:
    cgroups = SandboxCgroups(found)
    ident = new_id()
    path = sandbox_folder(parent, ident)
    used = [h for h in found if "devices" not in h.controllers]
    made = await cgroups.make(path)
    assert made == await cgroups.make(path) == [h.mount + path for h in used]
    async with sleeper() as process:
        await cgroups.admit(path, process.pid)
        assert len(os.listdir(f"/proc/{process.pid}/task")) == 2
        for folder in made:
            assert (Path(folder) / "cgroup.procs").read_text().split() == [str(process.pid)]
        if found is MOUNTED:
            assert cgroups_of(process.pid) == {path}
        await cgroups.remove(path)
        assert await process.wait() == -signal.SIGKILL
    assert folders(path) == []
    assert len(folders(parent)) == len(MOUNTED), "the pod's cgroup is the kubelet's"
    await cgroups.remove(path)


async def test_whether_a_pod_has_a_memory_limit(parent: str) -> None:
    cgroups = SandboxCgroups()
    assert not cgroups.is_unlimited(f"{parent}/none")
    [limit] = [
        path
        for hierarchy in MOUNTED
        for name in ("memory.max", "memory.limit_in_bytes")
        if (path := Path(f"{hierarchy.mount}{parent}/{name}")).exists()
    ]
    assert cgroups.is_unlimited(parent)
    limit.write_text(str(64 << 20))
    assert not cgroups.is_unlimited(parent)


async def test_without_a_parent_nothing_is_left_when_the_last_one_goes() -> None:
    cgroups = SandboxCgroups()
    paths = [sandbox_folder("", new_id()) for _ in range(8)]
    # All at once: the common parent comes and goes under them.
    for _ in range(5):
        made = await asyncio.gather(*(cgroups.make(path) for path in paths))
        assert all(Path(folder).is_dir() for item in made for folder in item)
        await asyncio.gather(*(cgroups.remove(path) for path in paths))
    assert [folder for path in paths for folder in folders(path)] == []


async def test_a_slice_is_found_where_systemd_keeps_it() -> None:
    cgroups = SandboxCgroups()
    name = f"hptest{secrets.token_hex(4)}"
    runs.record("cgroup", f"{name}.slice")
    path = sandbox_folder(f"{name}-pod1.slice", new_id())
    try:
        assert f"{USED[0].mount}/{name}.slice/{name}-pod1.slice" in (await cgroups.make(path))[0]
    finally:
        await cgroups.remove(path)
        for hierarchy in USED:
            Path(f"{hierarchy.mount}/{name}.slice/{name}-pod1.slice").rmdir()
            Path(f"{hierarchy.mount}/{name}.slice").rmdir()


async def test_only_the_swept_ones_go(parent: str) -> None:
    cgroups = SandboxCgroups()
    idents = [new_id() for _ in range(3)]
    stray, other, plain = (sandbox_folder(p, i) for p, i in zip((parent, parent, ""), idents, strict=True))
    for path in (stray, other, plain):
        await cgroups.make(path)
    async with sleeper() as process:
        await cgroups.admit(stray, process.pid)
        await cgroups.sweep(set())
        assert len(folders(stray)) == len(USED)
        await cgroups.sweep({idents[0][:12], idents[2][:12]})
        assert await process.wait() == -signal.SIGKILL
    assert folders(stray) == folders(plain) == []
    assert len(folders(other)) == len(USED)
    await cgroups.remove(other)


async def test_nothing_but_a_sandboxs_own_cgroup_is_ever_removed(tmp_path: Path) -> None:
    """On plain folders: what this is about would take the whole host's processes with it."""
    cgroups = SandboxCgroups([Hierarchy(str(tmp_path), True)])
    ident = new_id()
    own = tmp_path / "pod" / f"hyperpod-{ident[:12]}"
    own.mkdir(parents=True)
    (tmp_path / "hyperpod").mkdir()
    await cgroups.sweep({"", "pod", "hyperpod", "hyperpod-", "/", "..", ident})
    assert own.is_dir() and (tmp_path / "hyperpod").is_dir()
    for path in ("", "/", "/pod", "/hyperpod", f"{ident[:12]}", f"/pod/hyperpod-{ident[:12]}/.."):
        with pytest.raises(ValueError, match="is not a sandbox's cgroup"):
            await cgroups.remove(path)
    await cgroups.sweep({ident[:12]})
    assert not own.exists()


async def test_a_process_that_is_gone_is_none(parent: str) -> None:
    cgroups = SandboxCgroups()
    path = sandbox_folder(parent, new_id())
    await cgroups.make(path)
    async with sleeper() as process:
        process.kill()
        await process.wait()
    await cgroups.admit(path, process.pid)
    await cgroups.remove(path)


async def test_a_file_is_no_cgroup() -> None:
    with pytest.raises(InvalidArgument, match="cpu.stat is not a cgroup"):
        await SandboxCgroups(V2).make(sandbox_folder("/cpu.stat", new_id()))


async def test_a_host_without_cgroups_goes_without(caplog: pytest.LogCaptureFixture) -> None:
    cgroups = SandboxCgroups([])
    path = sandbox_folder("", new_id())
    assert await cgroups.make(path) == []
    async with sleeper() as process:
        await cgroups.admit(path, process.pid)
        await cgroups.remove(path, "hp-x")
        assert process.returncode is None
    assert caplog.text.count("no writable cgroup file system") == 1


async def test_a_hierarchy_that_turns_read_only_is_left_out_and_logged_once(
    parent: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    subprocess.run(["mount", "--bind", USED[0].mount, tmp_path], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", tmp_path], check=True)
        assert not any(h.mount == str(tmp_path) for h in mounted())
        cgroups = SandboxCgroups([replace(USED[0], mount=str(tmp_path)), *V2])
        paths = [sandbox_folder(parent, new_id()) for _ in range(2)]
        for path in paths:
            assert await cgroups.make(path) == [V2[0].mount + path]
            await cgroups.remove(path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert caplog.text.count(f"going on without {tmp_path}: Read-only file system") == 1


async def test_what_libvirt_left_of_a_dead_domain_goes() -> None:
    cgroups = SandboxCgroups()
    domain = f"hp-{secrets.token_hex(6)}"
    mine, other = f"qemu-embed-0-1-{domain}.libvirt-qemu", f"qemu-embed-0-2-{domain}x.libvirt-qemu"
    machine = Path(USED[0].mount) / "machine"
    (machine / mine / "emulator").mkdir(parents=True)
    (machine / other).mkdir()
    await cgroups.remove(sandbox_folder("", new_id()), domain)
    assert not (machine / mine).exists()
    (machine / other).rmdir()


async def test_a_qemu_is_found_by_its_whole_name_and_its_user() -> None:
    name = f"hp-{secrets.token_hex(6)}"
    async with sleeper(name) as process:
        assert qemu_pid(name, os.getuid()) == process.pid
        assert qemu_pid(name[:-1], os.getuid()) is None
        assert qemu_pid(name, 12345) is None


@pytest.mark.parametrize("setting", ["auto", "cgroupfs", "systemd"])
async def test_the_driver_that_the_kubelet_is_told(setting: str) -> None:
    config = Config.model_validate({"cgroup_driver": setting})
    service = RuntimeService(NOWHERE, config, NOWHERE)
    init = Path("/proc/1/comm").read_text().strip()
    driver = setting if setting != "auto" else "systemd" if init == "systemd" else "cgroupfs"
    for _ in range(2):
        linux = (await service.runtime_config(cri.RuntimeConfigRequest())).linux
        assert linux is not None
        assert linux.cgroup_driver is cri.CgroupDriver[driver.upper()]
