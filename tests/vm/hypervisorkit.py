"""Drives tests.vm.hypervisor_process; a guest small enough to test a hypervisor with; looks for leftovers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hyperpod.hypervisor.connection import QEMU_CONF
from hyperpod.processes import stat_fields
from hyperpod.spec.domain import DomainSpec

ROOT = Path(__file__).resolve().parent.parent.parent
PROCESS = (sys.executable, "-m", "tests.vm.hypervisor_process")
BOOT = 180.0
"""Seconds for a guest to answer on a loaded host."""

INIT = """#!/bin/busybox sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
stty -echo </dev/console
mount -t ext4 -o prjquota /dev/vdb /mnt && grep vdb /proc/mounts
echo guest-is-up
while read -r word; do
  case $word in
    disks) for disk in /sys/block/sd*; do
        [ -e $disk ] || continue
        echo "lun $(tail -c +5 $disk/device/vpd_pg80) ro=$(cat $disk/ro) $(head -c 8 /dev/${disk##*/})"
      done ;;
    write) dd if=/dev/zero of=/mnt/full bs=1M count=8 2>&1 | tail -1; sync; df -k /mnt ;;
    size) echo "cpus $(cat /sys/devices/system/cpu/possible) $(cat /sys/devices/system/cpu/online)" ;;
    vsock) cat /sys/bus/virtio/devices/*/device ;;
    off) poweroff -f ;;
    panic) exit 1 ;;
  esac
  echo done-$word
done </dev/console
"""


def make_guest(folder: Path) -> Path:
    """A squashfs image with busybox and INIT."""
    tree = folder / "tree"
    for name in ("bin", "dev", "proc", "sys", "mnt"):
        (tree / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin" / "busybox")
    for applet in ("sh", "mount", "stty", "grep", "tail", "head", "cat", "dd", "sync", "df", "poweroff"):
        (tree / "bin" / applet).symlink_to("busybox")
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    image = folder / "guest.squashfs"
    subprocess.run(["mksquashfs", tree, image, "-quiet", "-no-progress", "-all-root"], check=True)
    shutil.rmtree(tree)
    return image


class Console:
    """Listens where QEMU's serial port connects to."""

    def __init__(self, path: Path, uid: int) -> None:
        self.path, self._uid = path, uid
        self.text = ""
        self._grown = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Console:
        self._server = await asyncio.start_unix_server(self._connected, self.path)
        os.chown(self.path, self._uid, self._uid)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()
        self.path.unlink(missing_ok=True)  # from Python 3.13 on the server removes it

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                self.text += data.decode(errors="replace")
                self._grown.set()

    async def wait(self, needle: str) -> str:
        """Until the guest has written `needle`; returns all text since the last wait."""
        try:
            async with asyncio.timeout(BOOT):
                while needle not in self.text:
                    self._grown.clear()
                    await self._grown.wait()
        except TimeoutError:
            raise AssertionError(f"the guest did not write {needle!r}: {self.text[-2000:]!r}") from None
        text, self.text = self.text, ""
        return text

    async def ask(self, word: str, answer: str = "") -> str:
        """Send a word of INIT's, wait for its end."""
        assert self._writer is not None
        self._writer.write(word.encode() + b"\n")
        return await self.wait(answer or f"done-{word}")

    async def ask_for(self, word: str, *needles: str, without: str = "done with nothing") -> str:
        """Ask again and again until the answer has all of `needles`, and not `without`: a guest sees a while later
        what was plugged in or out."""
        text = ""
        try:
            async with asyncio.timeout(BOOT):
                while True:
                    text = await self.ask(word)
                    if all(needle in text for needle in needles) and without not in text:
                        return text
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"{word} did not show {needles}: {text!r}") from None


class Owner:
    """The test's side of hypervisor_process."""

    def __init__(self, run_dir: Path, instance: str = "test-instance", uri: str = "") -> None:
        self.run_dir, self._argv = run_dir, [str(run_dir), instance, uri]
        self.events: list[dict[str, str]] = []
        self.ready: dict[str, Any] = {}
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._changed = asyncio.Event()
        self._next = 0

    async def __aenter__(self) -> Owner:
        log = (self.run_dir / "owner.log").open("ab")
        with log:
            self._process = await asyncio.create_subprocess_exec(
                *PROCESS, "parent", *PROCESS, "owner", *self._argv, cwd=ROOT,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        self._reading = asyncio.create_task(self._read(), name="owner")
        await self._until(lambda: bool(self.ready), "opening")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        async with asyncio.timeout(BOOT):
            await self._process.wait()
            await self._reading

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            message = json.loads(line)
            if "event" in message:
                self.events.append(message["event"])
            elif "ready" in message:
                self.ready = message
            else:
                self._replies.pop(message["id"]).set_result(message)
            self._changed.set()

    async def _until(self, condition: Any, what: str) -> None:
        try:
            async with asyncio.timeout(BOOT):
                while not condition():
                    if self._reading.done():
                        break
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass
        log = (self.run_dir / "owner.log").read_text()[-3000:]
        assert condition(), f"{what}: not within {BOOT} s\n{log}"

    def send(self, op: str, **arguments: Any) -> tuple[int, asyncio.Future[dict[str, Any]]]:
        """Start a command."""
        line, number, future = self._command(op, arguments)
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        return number, future

    def send_and_cancel(self, op: str, **arguments: Any) -> asyncio.Future[dict[str, Any]]:
        """Start a command that is cancelled as soon as it has begun: both come to the owner at once."""
        line, number, future = self._command(op, arguments)
        cancel, _, _ = self._command("cancel", {"target": number})
        assert self._process.stdin is not None
        self._process.stdin.write(line + cancel)
        return future

    def _command(
        self, op: str, arguments: dict[str, Any]
    ) -> tuple[bytes, int, asyncio.Future[dict[str, Any]]]:
        self._next += 1
        future = self._replies[self._next] = asyncio.get_running_loop().create_future()
        line = json.dumps({"id": self._next, "op": op, **arguments}).encode() + b"\n"
        return line, self._next, future

    async def raw(self, op: str, **arguments: Any) -> dict[str, Any]:
        async with asyncio.timeout(BOOT):
            return await self.send(op, **arguments)[1]

    async def call(self, op: str, **arguments: Any) -> Any:
        """The result; an error fails the test."""
        reply = await self.raw(op, **arguments)
        assert "error" not in reply, reply
        return reply["result"]

    async def patient(self, op: str, **arguments: Any) -> Any:
        """As `call`, again and again while libvirt is away."""
        async with asyncio.timeout(BOOT):
            while (reply := await self.raw(op, **arguments)).get("error") == "Unavailable":
                await asyncio.sleep(0.05)
        assert "error" not in reply, reply
        return reply["result"]

    async def create(self, spec: DomainSpec) -> None:
        await self.call("create", spec=asdict(spec))

    async def event(self, kind: str) -> dict[str, str]:
        """The first event of that kind, now or later."""
        await self._until(
            lambda: any(e["kind"] == kind for e in self.events), f"event {kind} of {self.events}"
        )
        return next(e for e in self.events if e["kind"] == kind)

    async def kill(self) -> None:
        """kill -9 of the owner; returns when its successor has opened."""
        pid, self.ready = self.ready["ready"], {}
        os.kill(pid, signal.SIGKILL)
        await self._until(lambda: bool(self.ready), "opening again")


class Libvirtd:
    """A libvirtd in a mount namespace of its own, over folders below `base`; a killed one is started again."""

    FOLDERS = ("/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt", "/run/libvirt")

    def __init__(self, base: Path) -> None:
        self.base = base
        self.uri = f"qemu+unix:///system?socket={base / 'run' / 'libvirt-sock'}"

    async def __aenter__(self) -> Libvirtd:
        script = ["set -e"]
        self._made = [folder for folder in self.FOLDERS if not Path(folder).exists()]
        for folder, name in zip(self.FOLDERS, ("etc", "lib", "cache", "log", "run"), strict=True):
            Path(folder).mkdir(exist_ok=True)
            (self.base / name).mkdir(parents=True)
            script.append(f"mount --bind {self.base / name} {folder}")
        (self.base / "etc" / "qemu.conf").write_text(QEMU_CONF)
        (self.base / "etc" / "libvirtd.conf").write_text('auth_unix_rw = "none"\n')
        script.append("exec libvirtd --config /etc/libvirt/libvirtd.conf")
        with (self.base / "libvirtd.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *PROCESS, "parent", "unshare", "--mount", "sh", "-c", "\n".join(script), cwd=ROOT,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        async with asyncio.timeout(BOOT):
            while not self._listens():
                await asyncio.sleep(0.02)
        return self

    def _listens(self) -> bool:
        """Its socket is there some time before it listens."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.base / "run" / "libvirt-sock"))
            return True
        return False

    def pid(self) -> int:
        # Not by the kernel's list of children, which leaves some out when another ends meanwhile.
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if (
                    entry.isdecimal()
                    and Path(f"/proc/{entry}/comm").read_text() == "libvirtd\n"
                    and int(stat_fields(entry)[1]) == self._process.pid
                ):
                    return int(entry)
        raise AssertionError("libvirtd is not running")

    async def kill(self) -> None:
        """kill -9; its successor comes by itself."""
        os.kill(self.pid(), signal.SIGKILL)

    async def __aexit__(self, *_: object) -> None:
        os.kill(self.pid(), signal.SIGTERM)
        async with asyncio.timeout(BOOT):
            await self._process.wait()
        for folder in self._made:
            Path(folder).rmdir()


def processes(mark: str) -> dict[int, str]:
    """Command lines that have `mark` in them, by pid."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                line = (
                    Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
                if mark in line:
                    found[int(entry)] = line
    return found


def emulator(name: str) -> int:
    """The pid of the one QEMU of that domain."""
    (pid,) = processes(f"-name guest={name},")
    return pid


def leftovers(run_dir: Path, name: str) -> list[str]:
    """What is there of that domain although it is gone."""
    root = run_dir / "libvirt"
    left = list(processes(f"-name guest={name},").values())
    # Not by glob, which fails when somebody else's goes meanwhile.
    left += [
        f"{top}/{found}"
        for top, folders, files in os.walk(root)
        for found in (*folders, *files)
        if name in found or "domain-" in found
    ]
    left += [top for top, _, _ in os.walk("/sys/fs/cgroup") if name in Path(top).name]
    return left
