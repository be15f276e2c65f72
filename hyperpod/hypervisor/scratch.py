"""Scratch disks: one sparse ext4 image per sandbox, for its containers' writable layers.

Copied from a template, which mkfs makes once per size; no journal, since a crash of the VM ends the pod anyway.
Never mounted on the host.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from hyperpod.errors import HyperpodError, ResourceExhausted

TIMEOUT = 60.0


class ScratchDisks:
    """All below `<state_dir>/scratch`."""

    def __init__(self, state_dir: Path) -> None:
        self.root = state_dir / "scratch"
        self._lock = asyncio.Lock()

    async def create(self, path: Path, size_mib: int, uid: int, gid: int) -> None:
        """Make a disk, 0600 and owned by uid:gid. Raises ResourceExhausted when there is no room."""
        template = await self._template(size_mib)
        try:
            await _run("cp", "--sparse=always", "--reflink=auto", str(template), str(path))
            path.chmod(0o600)
            os.chown(path, uid, gid)
        except (HyperpodError, OSError):
            path.unlink(missing_ok=True)
            raise

    async def remove(self, path: Path) -> None:
        """Fine when there is none."""
        await asyncio.to_thread(path.unlink, missing_ok=True)

    async def _template(self, size_mib: int) -> Path:
        path = self.root / f"template-{size_mib}.ext4"
        async with self._lock:
            if not path.exists():
                self.root.mkdir(parents=True, exist_ok=True, mode=0o711)
                temp = self.root / f".template-{size_mib}.tmp"
                temp.unlink(missing_ok=True)
                await _run(
                    "mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-m", "0", "-L", "scratch",
                    "-E", "lazy_itable_init=1,nodiscard", str(temp), f"{size_mib}M",
                )  # fmt: skip
                temp.chmod(0o600)
                temp.rename(path)
        return path


async def _run(*argv: str) -> None:
    """Raises HyperpodError with the program's last words."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(TIMEOUT):
            out, _ = await process.communicate()
    except TimeoutError as exc:
        process.kill()
        await process.wait()
        raise HyperpodError(f"{argv[0]} took longer than {TIMEOUT:.0f} s") from exc
    if process.returncode:
        text = out.decode(errors="replace").strip()[-500:]
        kind = ResourceExhausted if "No space left" in text else HyperpodError
        raise kind(f"{argv[0]} failed: {text}")
