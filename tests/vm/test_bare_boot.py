"""Guest kernels and root image in QEMU alone, without libvirt or daemon: what the two builders promise."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kernel.build import FRAGMENT
from kernel.fragment import Fragment

pytestmark = pytest.mark.vm

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 240.0

# PID 1 of a test image: says what this kernel has, then powers off.
PROBE = """
import ctypes, errno, gzip, json, os, socket
libc = ctypes.CDLL(None, use_errno=True)

def mount(source, target, kind, flags=0, data=b""):
    if libc.mount(source, target, kind, flags, data):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)

def read(path):
    with open(path) as file:
        return file.read()

def can_open(family):
    try:
        socket.socket(family, socket.SOCK_STREAM if family == 40 else socket.SOCK_SEQPACKET).close()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"

def loops_back():
    with socket.socket(40, socket.SOCK_STREAM) as server, socket.socket(40, socket.SOCK_STREAM) as client:
        server.bind((0xFFFFFFFF, 4000))
        server.listen()
        client.settimeout(2)
        try:
            client.connect((1, 4000))
        except OSError as error:
            return type(error).__name__
    return "connected"

def main(argv):
    mount(b"proc", b"/proc", b"proc")
    mount(b"sysfs", b"/sys", b"sysfs")
    mount(b"tmpfs", b"/run", b"tmpfs")
    mount(b"cgroup2", b"/sys/fs/cgroup", b"cgroup2")
    for name in ("u", "w", "m"):
        os.mkdir(f"/run/{name}")
    mount(b"overlay", b"/run/m", b"overlay", 0, b"lowerdir=/usr,upperdir=/run/u,workdir=/run/w")
    report = {
        "argv": argv,
        "release": os.uname().release,
        "cmdline": read("/proc/cmdline").strip(),
        "filesystems": [line.split()[-1] for line in read("/proc/filesystems").splitlines()],
        "controllers": read("/sys/fs/cgroup/cgroup.controllers").split(),
        "root": [line.split()[2] for line in read("/proc/mounts").splitlines() if line.split()[1] == "/"],
        "overlay": sorted(os.listdir("/run/m")),
        "vsock": can_open(40),
        "alg": can_open(38),
        "loopback": loops_back(),
        "present": [p for p in ("/proc/kallsyms", "/proc/modules", "/dev/mem", "/proc/kcore", "/proc/sysrq-trigger",
                                "/dev/net/tun", "/dev/fuse", "/dev/hwrng") if os.path.exists(p)],
        "config": gzip.open("/proc/config.gz", "rt").read().splitlines() if os.path.exists("/proc/config.gz")
                  else [],
    }
    os.write(1, b"\\nPROBE " + json.dumps(report).encode() + b"\\n")
    libc.reboot(0x4321FEDC)
"""


def run_builder(*command: str) -> Path:
    """Run one of the builders; it answers at once when the cache has it."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=3600
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def guest() -> Path:
    return Path(os.environ.get("HYPERPOD_TEST_GUEST") or run_builder("images/build.py"))


@pytest.fixture(scope="session")
def kernel() -> Path:
    return Path(os.environ.get("HYPERPOD_TEST_KERNEL") or run_builder("kernel/build.py"))


@pytest.fixture(scope="session")
def cloud_kernel() -> Path:
    return run_builder("kernel/cloud.py")


@pytest.fixture(scope="session")
def probe() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hyperpod-probe-") as folder:
        (Path(folder) / "guestprobe.py").write_text(PROBE)
        yield run_builder("images/build.py", "--entry", "guestprobe", "--path", folder)


def boot(kernel: Path, guest: Path, until: str) -> str:
    """Boot until a line that contains `until` is whole, or QEMU ends; the console so far. QEMU is gone after it."""
    machine, root = (json.loads((folder / "manifest.json").read_text()) for folder in (kernel, guest))
    command = [
        *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-m", "256", "-nodefaults", "-no-user-config"),
        *("-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", str(kernel / machine["kernel"])),
        *(("-initrd", str(kernel / machine["initrd"])) if machine["initrd"] else ()),
        *("-append", f"{machine['cmdline']} {root['cmdline']}"),
        *("-drive", f"file={guest / root['root']},format=raw,if=none,id=root,readonly=on"),
        *("-device", "virtio-blk-pci,drive=root", "-device", "virtio-rng-pci"),
    ]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    console, ends = b"", time.monotonic() + DEADLINE
    try:
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            while (left := ends - time.monotonic()) > 0:
                if ready.select(left):
                    data = os.read(process.stdout.fileno(), 65536)
                    console += data
                    found = console.find(until.encode())
                    if not data or (found >= 0 and b"\n" in console[found:]):
                        return console.decode(errors="replace")
        raise AssertionError(
            f"nothing after {DEADLINE} s; console: {console[-2000:].decode(errors='replace')}"
        )
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def report(console: str) -> dict[str, Any]:
    """What the probe says."""
    lines = [line for line in console.splitlines() if line.startswith("PROBE ")]
    assert lines, console[-2000:]
    found: dict[str, Any] = json.loads(lines[0].removeprefix("PROBE "))
    return found


def test_image_boots_to_the_agent(kernel: Path, guest: Path) -> None:
    console = boot(kernel, guest, "hyperpod-agent: phase=cgroups")
    assert "hyperpod-agent: phase=cgroups" in console, console[-2000:]


def test_kernel_in_the_guest_is_the_one_asked_for(kernel: Path, probe: Path) -> None:
    found = report(boot(kernel, probe, "PROBE "))
    assert found["argv"] == ["--guest"]
    assert str(found["release"]).endswith("-hyperpod")
    assert found["root"] == ["squashfs"]
    config = found["config"]
    options = Fragment.read(FRAGMENT).options.items()
    assert [name for name, value in options if value and f"CONFIG_{name}={value}" not in config] == []
    assert [name for name, value in options if value is None and f"CONFIG_{name}=y" in config] == []
    assert {"cpuset", "cpu", "io", "memory", "hugetlb", "pids", "rdma", "misc"} <= set(
        map(str, found["controllers"])
    )
    assert {"squashfs", "erofs", "ext4", "overlay", "virtiofs", "fuse"} <= set(found["filesystems"])
    assert "bin" in found["overlay"]


def test_guest_kernel_leaves_no_way_around_the_agent(kernel: Path, probe: Path) -> None:
    found = report(boot(kernel, probe, "PROBE "))
    assert found["vsock"] == "ok"
    assert found["alg"] == "EAFNOSUPPORT"
    assert found["loopback"] != "connected"
    assert found["present"] == ["/dev/net/tun", "/dev/fuse", "/dev/hwrng"]


def test_cloud_kernel_boots_the_same_image(cloud_kernel: Path, guest: Path, probe: Path) -> None:
    found = report(boot(cloud_kernel, probe, "PROBE "))
    assert "-cloud-amd64" in str(found["release"])
    assert {"squashfs", "erofs", "ext4", "overlay", "virtiofs"} <= set(found["filesystems"])
    assert found["vsock"] == "ok"
    console = boot(cloud_kernel, guest, "hyperpod-agent: phase=cgroups")
    assert "hyperpod-agent: phase=cgroups" in console, console[-2000:]
