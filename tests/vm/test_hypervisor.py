"""The hypervisor against real libvirt and QEMU: life, death, hot-plug, and a successor after kill -9."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from hyperpod.hypervisor.scratch import ScratchDisks
from hyperpod.spec.domain import Disk, DomainSpec
from tests.daemonkit import artifact
from tests.vm.hypervisorkit import BOOT, Console, Libvirtd, Owner, emulator, leftovers, make_guest, processes

pytestmark = pytest.mark.vm

UID = 1_700_001


@dataclass
class Place:
    """Folders for the tests of this file; QEMU's user can reach them."""

    base: Path
    run_dir: Path
    kernel: str
    cmdline: str
    guest: Path


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    base = Path(tempfile.mkdtemp(prefix="hyperpod-hv-"))
    run_dir = Path(tempfile.mkdtemp(prefix="hp-", dir="/run"))
    base.chmod(0o711)
    run_dir.chmod(0o711)
    try:
        folder = artifact("HYPERPOD_TEST_KERNEL", "kernel/build.py")
        manifest = json.loads((folder / "manifest.json").read_text())
        kernel = shutil.copy(folder / manifest["kernel"], base / "vmlinux")
        yield Place(base, run_dir, str(kernel), manifest["cmdline"], make_guest(base))
    finally:
        shutil.rmtree(base)
        shutil.rmtree(run_dir)


@pytest.fixture
async def owner(place: Place) -> AsyncIterator[Owner]:
    """An open hypervisor; at the end of the test no domain may be left."""
    async with Owner(place.run_dir) as one:
        yield one
        stray = await one.call("list")
        for info in stray:
            await one.call("destroy", name=info["name"])
    assert stray == []
    assert list(processes(str(place.run_dir)).values()) == []


@pytest.fixture
async def spec(place: Place, owner: Owner) -> AsyncIterator[DomainSpec]:
    """A VM that nobody has created yet."""
    ident = secrets.token_hex(32)
    folder = place.run_dir / "s" / ident[:12]
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o711)
    os.chown(folder, UID, UID)
    disks = ScratchDisks(place.base)
    scratch = disks.root / f"{ident}.raw"
    await disks.create(scratch, 256, UID, UID)
    name = f"hp-{ident[:12]}"
    yield DomainSpec(
        name=name,
        uuid=str(uuid.UUID(hex=ident[:32], version=4)),
        instance_id="test-instance",
        sandbox_id=ident,
        memory_mib=128,
        max_memory_mib=256,
        vcpus=1,
        max_vcpus=4,
        accelerator="tcg",
        kernel=place.kernel,
        initrd=None,
        cmdline=f"{place.cmdline} root=/dev/vda rootfstype=squashfs ro init=/init",
        root=str(place.guest),
        scratch=str(scratch),
        console_socket=str(folder / "console.sock"),
        vsock_socket=None,
        vsock_cid=None,
        uid=UID,
        gid=UID,
    )
    await disks.remove(scratch)
    shutil.rmtree(folder)
    assert leftovers(place.run_dir, name) == []


@pytest.fixture
async def console(spec: DomainSpec) -> AsyncIterator[Console]:
    async with Console(Path(spec.console_socket or ""), UID) as one:
        yield one


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


async def test_life_of_a_domain(owner: Owner, spec: DomainSpec, console: Console) -> None:
    await owner.create(spec)
    assert (await owner.event("started"))["sandbox_id"] == spec.sandbox_id
    text = await console.wait("guest-is-up")
    assert "/dev/vdb /mnt ext4 rw" in text
    assert "prjquota" in text
    (info,) = await owner.call("list")
    assert (info["name"], info["uuid"], info["sandbox_id"]) == (spec.name, spec.uuid, spec.sandbox_id)
    assert info["running"] is True
    assert info["ours"] is True
    # A guest under emulation takes itself for bare metal, where Linux ignores CPUs that may come later; so QEMU is
    # asked whether they may.
    (command,) = processes(f"-name guest={spec.name},").values()
    assert "-smp 1,maxcpus=4," in command
    assert "maxmem=262144k" in command
    await owner.call("destroy", name=spec.name)
    event = await owner.event("stopped")
    assert (event["name"], event["detail"]) == (spec.name, "it was destroyed")
    assert await owner.call("list") == []
    await owner.call("destroy", name=spec.name)


async def test_qemu_runs_as_the_sandboxes_own_user(owner: Owner, spec: DomainSpec, console: Console) -> None:
    await owner.create(spec)
    await console.wait("guest-is-up")
    found = status(emulator(spec.name))
    assert found["Uid"].split() == [str(UID)] * 4
    assert found["Gid"].split() == [str(UID)] * 4
    assert found["Groups"] in ("", str(UID))
    assert int(found["CapEff"], 16) == int(found["CapPrm"], 16) == 0
    assert found["Seccomp"] == "2"
    assert found["NoNewPrivs"] == "1"
    await owner.call("destroy", name=spec.name)


async def test_layers_come_and_go(owner: Owner, spec: DomainSpec, console: Console, place: Place) -> None:
    await owner.create(spec)
    await console.wait("guest-is-up")
    layer = place.base / "layer.img"
    layer.write_bytes(b"layerone" + bytes(1 << 16))
    disk = Disk(serial="a" * 32, path=str(layer), readonly=True, target=0, unit=7)
    await owner.call("attach", name=spec.name, disk=asdict(disk))
    await owner.call("attach", name=spec.name, disk=asdict(disk))  # again: fine
    others = [replace(disk, serial=f"{n:032d}", unit=n) for n in range(3)]
    replies = [owner.send("attach", name=spec.name, disk=asdict(other))[1] for other in others]
    assert ["error" not in await reply for reply in replies] == [True] * 3
    await console.ask_for("disks", *(f"lun {one.serial} ro=1 layerone" for one in (disk, *others)))
    await owner.call("detach", name=spec.name, serial=disk.serial)
    await owner.call("detach", name=spec.name, serial=disk.serial)
    await console.ask_for("disks", others[2].serial, without=disk.serial)
    missing = await owner.raw("attach", name=spec.name, disk=asdict(replace(disk, path="/nonexistent/layer")))
    assert "/nonexistent/layer" in missing["text"]
    await owner.call("destroy", name=spec.name)
    await owner.call("detach", name=spec.name, serial=others[0].serial)
    gone = await owner.raw("attach", name=spec.name, disk=asdict(disk))
    assert gone["error"] == "NotFound"


@pytest.mark.parametrize(
    ("word", "kinds", "detail"),
    [("off", {"stopped"}, "the guest powered off"), ("panic", {"crashed", "stopped"}, "the guest crashed")],
)
async def test_a_guest_that_ends_itself(
    owner: Owner, spec: DomainSpec, console: Console, word: str, kinds: set[str], detail: str
) -> None:
    await owner.create(spec)
    await console.wait("guest-is-up")
    await console.ask(word, answer="panic" if word == "panic" else "reboot: Power down")
    assert (await owner.event("stopped"))["detail"] == detail
    assert {e["kind"] for e in owner.events} >= kinds
    assert await owner.call("list") == []
    await owner.call("destroy", name=spec.name)


async def test_a_qemu_that_is_killed(owner: Owner, spec: DomainSpec, console: Console) -> None:
    await owner.create(spec)
    await console.wait("guest-is-up")
    os.kill(emulator(spec.name), signal.SIGKILL)
    assert (await owner.event("stopped"))["detail"] == "QEMU ended by itself"
    await owner.call("destroy", name=spec.name)


async def test_the_successor_of_a_killed_owner_adopts(
    owner: Owner, spec: DomainSpec, console: Console, place: Place
) -> None:
    await owner.create(spec)
    await console.wait("guest-is-up")
    pid = emulator(spec.name)
    await owner.kill()
    (info,) = await owner.call("list")
    assert (info["name"], info["running"], info["ours"]) == (spec.name, True, True)
    assert emulator(spec.name) == pid
    disk = Disk(serial="b" * 32, path=str(place.guest), readonly=True, target=0, unit=1)
    await owner.call("attach", name=spec.name, disk=asdict(disk))
    await console.ask_for("disks", disk.serial)
    owner.events.clear()
    await owner.call("destroy", name=spec.name)
    assert (await owner.event("stopped"))["sandbox_id"] == spec.sandbox_id


async def test_a_qemu_that_died_while_nobody_looked(owner: Owner, spec: DomainSpec, console: Console) -> None:
    await owner.create(spec)
    await console.wait("guest-is-up")
    os.kill(owner.ready["ready"], signal.SIGSTOP)
    os.kill(emulator(spec.name), signal.SIGKILL)
    await owner.kill()
    assert [info for info in await owner.call("list") if info["running"]] == []
    await owner.call("destroy", name=spec.name)


async def test_another_instances_domain_is_not_ours(owner: Owner, spec: DomainSpec, console: Console) -> None:
    await owner.create(replace(spec, instance_id="somebody-else"))
    await console.wait("guest-is-up")
    (info,) = await owner.call("list")
    assert (info["ours"], info["instance_id"]) == (False, "somebody-else")
    await owner.call("destroy", name=spec.name)


async def test_a_missing_kernel_names_phase_and_path(owner: Owner, spec: DomainSpec) -> None:
    reply = await owner.raw("create", spec=asdict(replace(spec, kernel="/nonexistent/vmlinux")))
    assert (reply["error"], reply["phase"]) == ("BootError", "domain")
    assert "/nonexistent/vmlinux" in reply["text"]
    assert await owner.call("list") == []
    await owner.call("destroy", name=spec.name)


async def test_a_disk_of_another_user_shows_qemus_words(owner: Owner, spec: DomainSpec) -> None:
    os.chown(spec.scratch or "", UID + 1, UID + 1)
    reply = await owner.raw("create", spec=asdict(spec))
    assert reply["error"] == "BootError"
    assert "Permission denied" in reply["text"]
    assert "last console lines" in reply["text"]
    await owner.call("destroy", name=spec.name)


async def test_the_same_name_twice(owner: Owner, spec: DomainSpec, console: Console) -> None:
    await owner.create(spec)
    await console.wait("guest-is-up")
    reply = await owner.raw("create", spec=asdict(spec))
    assert reply["error"] == "AlreadyExists"
    # The first one is untouched, and its end is still told.
    assert "cpus 0 0" in await console.ask("size")
    await owner.call("destroy", name=spec.name)
    await owner.event("stopped")


async def test_destroy_after_a_create_that_was_cancelled_at_once(
    owner: Owner, spec: DomainSpec, console: Console
) -> None:
    assert (await owner.send_and_cancel("create", spec=asdict(spec)))["error"] == "CancelledError"
    await owner.call("destroy", name=spec.name)
    assert await owner.call("list") == []
    assert processes(f"-name guest={spec.name},") == {}


@pytest.mark.parametrize("delay", [0.05, 0.15])
async def test_destroy_after_a_cancelled_create_leaves_nothing(
    owner: Owner, spec: DomainSpec, console: Console, delay: float
) -> None:
    number, created = owner.send("create", spec=asdict(spec))
    await asyncio.sleep(delay)
    await owner.call("cancel", target=number)
    assert (await created).get("error") in ("CancelledError", None)  # it may be over before
    await owner.call("destroy", name=spec.name)
    assert await owner.call("list") == []
    assert processes(f"-name guest={spec.name},") == {}


async def test_a_killed_owner_in_the_middle_of_create(
    owner: Owner, spec: DomainSpec, console: Console
) -> None:
    owner.send("create", spec=asdict(spec))
    await asyncio.sleep(0.08)
    await owner.kill()
    await owner.call("destroy", name=spec.name)
    assert processes(f"-name guest={spec.name},") == {}


async def test_a_domain_whose_qemu_was_about_to_be_started_is_forgotten(
    owner: Owner, spec: DomainSpec, console: Console, place: Place
) -> None:
    """What a death just before leaves is made of what a death afterwards leaves: only its status differs."""
    await owner.create(spec)
    await console.wait("guest-is-up")
    os.kill(owner.ready["ready"], signal.SIGSTOP)
    os.kill(emulator(spec.name), signal.SIGKILL)
    file = place.run_dir / "libvirt" / "run" / "qemu" / f"{spec.name}.xml"
    text = file.read_text()
    for pattern, unstarted in (
        (r"<domstatus [^>]*>", "<domstatus state='paused' reason='starting up' pid='0'>"),
        ("<libDir ", "<job type='none' async='start' flags='0x0'/><libDir "),
    ):
        text, count = re.subn(pattern, unstarted, text)
        assert count == 1, pattern
    file.write_text(text)
    await owner.kill()
    assert await owner.call("list") == []
    await owner.call("destroy", name=spec.name)


async def test_a_qemu_without_its_status_file_is_swept(
    owner: Owner, spec: DomainSpec, console: Console, place: Place
) -> None:
    await owner.create(spec)
    await console.wait("guest-is-up")
    (place.run_dir / "libvirt" / "run" / "qemu" / f"{spec.name}.xml").write_text("<domstatus")
    await owner.kill()
    assert processes(f"-name guest={spec.name},") == {}
    assert await owner.call("list") == []
    await owner.call("destroy", name=spec.name)


@contextlib.asynccontextmanager
async def vsock_device(folder: Path) -> AsyncIterator[None]:
    """A device in a process of the sandbox's user, killed at the end; entered when it listens."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(BOOT)
    (folder / "vhost.sock").unlink(missing_ok=True)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.component.vsock_device_process", str(folder), str(theirs.fileno()),
        f"uid={UID}", pass_fds=[theirs.fileno()],
    )  # fmt: skip
    theirs.close()
    try:
        async with asyncio.timeout(BOOT):
            while not (folder / "vhost.sock").exists():
                await asyncio.sleep(0.02)
            yield
            # A state with the guest's memory and rings in it says that the guest's driver runs on this device.
            while len(await asyncio.to_thread(receive, ours)) < 3:
                pass
    finally:
        process.kill()
        await process.wait()
        ours.close()


def receive(sock: socket.socket) -> list[int]:
    """How many descriptors came with the next state; they are closed."""
    _, fds, _, _ = socket.recv_fds(sock, 65536, 32)
    for fd in fds:
        os.close(fd)
    return fds


async def test_a_vsock_device_whose_back_end_died_is_replaced(
    owner: Owner, spec: DomainSpec, console: Console
) -> None:
    folder = console.path.parent
    spec = replace(spec, vsock_socket=str(folder / "vhost.sock"))
    async with vsock_device(folder):
        await owner.create(spec)
        await console.wait("guest-is-up")
        assert "0x0013" in await console.ask("vsock")
    async with vsock_device(folder):
        await owner.call("replug", name=spec.name, path=spec.vsock_socket)
        await console.ask_for("vsock", "0x0013")
    await owner.call("destroy", name=spec.name)


async def test_a_libvirtd_that_goes_away_and_comes_back(
    place: Place, spec: DomainSpec, console: Console
) -> None:
    async with (
        Libvirtd(place.run_dir / "system") as libvirtd,
        Owner(place.run_dir, uri=libvirtd.uri) as owner,
    ):
        await owner.create(spec)
        await owner.event("started")
        await console.wait("guest-is-up")
        await libvirtd.kill()
        (info,) = await owner.patient("list")
        assert (info["name"], info["running"], info["ours"]) == (spec.name, True, True)
        disk = Disk(serial="c" * 32, path=str(place.guest), readonly=True, target=0, unit=1)
        await owner.call("attach", name=spec.name, disk=asdict(disk))
        await console.ask_for("disks", disk.serial)
        # It dies while nobody can tell: that comes out when libvirt is back, without a question of ours.
        pid = emulator(spec.name)
        libvirtd_pid = libvirtd.pid()
        os.kill(libvirtd_pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        os.kill(libvirtd_pid, signal.SIGKILL)
        assert (await owner.event("stopped"))["sandbox_id"] == spec.sandbox_id
        assert await owner.patient("list") == []
        await owner.call("destroy", name=spec.name)
