"""An agent in a VM for the agent's test-suite: QEMU and a vsock device alone, without libvirt or daemon."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hyperpod.agentclient.types import Layer
from hyperpod.hypervisor import tsc
from hyperpod.vsock.dial import HybridEndpoint
from tests.agentkit import REPOSITORY, AgentPlace, make_busybox_layer

MEMORY_MIB = 384
SCRATCH_MIB = 1024
DEADLINE = 180.0


def built(variable: str, script: str) -> Path:
    """The folder of a kernel or guest image: the environment's, or built now."""
    if folder := os.environ.get(variable):
        return Path(folder)
    for arguments in ([], ["--print-path"]):
        done = subprocess.run(
            [sys.executable, script, *arguments], cwd=REPOSITORY, check=True, capture_output=True, text=True
        )
    return Path(done.stdout.strip().splitlines()[-1])


@contextlib.contextmanager
def running(argv: list[str], log: Path, pass_fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """A process with its output in `log`; killed at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=pass_fds,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        assert process.poll() is None, f"it ended before {path} was there"
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


@contextlib.contextmanager
def vm_agent() -> Iterator[AgentPlace]:
    """A booted VM whose agent nobody has claimed yet; its console is shown when something fails."""
    kernel = built("HYPERPOD_TEST_KERNEL", "kernel/build.py")
    guest = built("HYPERPOD_TEST_GUEST", "images/build.py")
    with tempfile.TemporaryDirectory(prefix="hp-agentvm-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        layer = make_busybox_layer(folder)
        scratch = folder / "scratch.raw"
        with scratch.open("wb") as file:
            file.truncate(SCRATCH_MIB << 20)
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", scratch], check=True)
        keeper, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.callback(keeper.close)
        with theirs:
            device = stack.enter_context(
                running(
                    [
                        sys.executable,
                        "-m",
                        "tests.component.vsock_device_process",
                        name,
                        str(theirs.fileno()),
                    ],
                    folder / "device.log",
                    (theirs.fileno(),),
                )
            )
        wait_for(folder / "vhost.sock", device)
        stack.enter_context(running(qemu(kernel, guest, layer, scratch, folder), folder / "console.log"))
        try:
            yield AgentPlace(
                HybridEndpoint(str(folder / "vsock.sock")),
                secrets.token_hex(32),
                secrets.token_bytes(32),
                (Layer(serial="busybox", path="", fstype="squashfs"),),
                memory_limits=True,
            )
        finally:
            print((folder / "console.log").read_text(errors="replace")[-4000:])


def qemu(kernel: Path, guest: Path, layer: Path, scratch: Path, folder: Path) -> list[str]:
    """The command of a VM as the daemon makes them: memfd memory, virtio disks, a vhost-user vsock device."""
    kernel_manifest = json.loads((kernel / "manifest.json").read_text())
    guest_manifest = json.loads((guest / "manifest.json").read_text())
    command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    command += ["-M", "q35,accel=tcg,memory-backend=mem", "-cpu", "max", "-smp", "1", "-m", str(MEMORY_MIB)]
    command += ["-object", f"memory-backend-memfd,id=mem,size={MEMORY_MIB}M,share=on"]
    command += ["-kernel", str(kernel / kernel_manifest["kernel"])]
    # As the daemon does: a guest that measures its clock on a busy host may find one that is ten times too fast.
    clock = f"tsc_early_khz={khz}" if (khz := tsc.measure()) else ""
    command += ["-append", f"{kernel_manifest['cmdline']} {clock} {guest_manifest['cmdline']}"]
    for number, (path, readonly, device) in enumerate(
        (
            (guest / guest_manifest["root"], "on", "virtio-blk-pci"),
            (scratch, "off", "virtio-blk-pci,serial=scratch"),
            (layer, "on", "scsi-hd,serial=busybox"),
        )
    ):
        if device.startswith("scsi"):
            command += ["-device", "virtio-scsi-pci"]
        command += ["-drive", f"file={path},if=none,format=raw,id=d{number},readonly={readonly}"]
        command += ["-device", f"{device},drive=d{number}"]
    command += ["-chardev", f"socket,id=vs,path={folder / 'vhost.sock'}"]
    command += ["-device", "vhost-user-vsock-pci,chardev=vs", "-serial", "stdio"]
    return command
