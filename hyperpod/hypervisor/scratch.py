"""Scratch disks: one sparse ext4 image per sandbox, for its containers' writable layers.

Copied from a template, which mkfs makes once per size. No journal, since a crash of the VM ends the pod anyway;
project quota, for limits and statistics per container. Never mounted on the host.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
from pathlib import Path

from hyperpod.errors import HyperpodError, ResourceExhausted

TIMEOUT = 60.0

FORMAT = 2
"""Part of the template's name: count up with each change of MKFS."""

MKFS = (
    "mkfs.ext4", "-q", "-F", "-m", "0", "-L", "scratch",
    "-O", "^has_journal,quota,project",
    # The file is sparse, so its inode tables are zeros: else every guest would write them out (160 MB of 10 GB).
    "-E", "quotatype=prjquota,lazy_itable_init=0,assume_storage_prezeroed=1,nodiscard",
)  # fmt: skip

FICLONE = 0x40049409
_CHUNK = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class ScratchDisks:
    """All below `<state_dir>/scratch`."""

    def __init__(self, state_dir: Path) -> None:
        self.root = state_dir / "scratch"
        self._lock = asyncio.Lock()

    async def create(self, path: Path, size_mib: int, uid: int, gid: int) -> None:
        """Make a disk, 0600 and owned by uid:gid. Raises ResourceExhausted when there is no room."""
        template = await self._template(size_mib)
        try:
            await asyncio.to_thread(_clone, template, path, uid, gid)
        except OSError as exc:
            kind = ResourceExhausted if exc.errno in _NO_ROOM else HyperpodError
            raise kind(f"scratch disk {path}: {exc.strerror}") from exc

    async def remove(self, path: Path) -> None:
        """Fine when there is none."""
        await asyncio.to_thread(path.unlink, missing_ok=True)

    async def _template(self, size_mib: int) -> Path:
        path = self.root / f"template-{FORMAT}-{size_mib}.ext4"
        async with self._lock:
            if not path.exists():
                self.root.mkdir(parents=True, exist_ok=True, mode=0o711)
                temp = self.root / f".template-{size_mib}.tmp"
                temp.unlink(missing_ok=True)
                try:
                    await _run(*MKFS, str(temp), f"{size_mib}M")
                    await asyncio.to_thread(_keep, temp, path)
                finally:
                    temp.unlink(missing_ok=True)
        return path


def _keep(temp: Path, path: Path) -> None:
    """Whole on the disk before it has its name: a host crash must not leave half a template for ever."""
    fd = os.open(temp, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchmod(fd, 0o600)
        os.fsync(fd)
    finally:
        os.close(fd)
    temp.rename(path)


def _clone(template: Path, path: Path, uid: int, gid: int) -> None:
    """A sparse copy, private from its first byte. Nothing is left when it raises OSError."""
    source = os.open(template, os.O_RDONLY | os.O_CLOEXEC)
    try:
        path.unlink(missing_ok=True)
        target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _copy(source, target)
            os.fchown(target, uid, gid)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(target)
    finally:
        os.close(source)


def _copy(source: int, target: int) -> None:
    """By reflink where the file system can, else extent by extent."""
    with contextlib.suppress(OSError):  # not supported, or across file systems
        fcntl.ioctl(target, FICLONE, source)
        return
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    end = 0
    while end < size:
        try:
            start = os.lseek(source, end, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return  # nothing but a hole follows
            raise
        end = os.lseek(source, start, os.SEEK_HOLE)
        while start < end:
            start += os.pwrite(target, os.pread(source, min(_CHUNK, end - start), start), start)


async def _run(*argv: str) -> None:
    """Raises HyperpodError with the program's last words."""
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as exc:
        raise HyperpodError(f"{argv[0]}: {exc.strerror}; `hyperpod doctor` names its package") from exc
    try:
        async with asyncio.timeout(TIMEOUT):
            out, _ = await process.communicate()
    except TimeoutError as exc:
        raise HyperpodError(f"{argv[0]} took longer than {TIMEOUT:.0f} s") from exc
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        text = out.decode(errors="replace").strip()[-500:]
        kind = ResourceExhausted if "No space left" in text else HyperpodError
        raise kind(f"{argv[0]} failed: {text}")
