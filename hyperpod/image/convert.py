"""Layer blobs to block images in the store's layers folder, by the confined worker.

A layer file is named by the digest of the uncompressed tar that the worker computed (naming.py). A layer that
is here already is not built again, but its blob was fetched with this pull's credentials and is verified all the
same: knowing a diff id gives nobody a layer.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import logging
import os
import re
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hyperpod
from hyperpod import errors
from hyperpod.errors import HyperpodError, ImageError, NotFound, ResourceExhausted
from hyperpod.image.manifest import Blob
from hyperpod.image.naming import layer_file, layer_name
from hyperpod.image.process import run
from hyperpod.image.settings import ImageSettings
from hyperpod.logs import printable
from hyperpod.model.images import LayerRef

log = logging.getLogger(__name__)
_OUTPUT = "layer.img"
_TREE = "tree"
_LINE = 4 << 20
_VARIANT = re.compile(r"[0-9a-f]{64}")
_CODE = str(Path(hyperpod.__file__).parent.parent)


@dataclass(frozen=True)
class Converted:
    """`size` in bytes uncompressed; `opaque_root`: the layer hides all below it."""

    layer: LayerRef
    size: int
    opaque_root: bool


@dataclass(frozen=True)
class Waiting:
    """Verified; not built, as some of its folders are what the layers below it say (spec/parents.py)."""

    opaque_root: bool


def open_blob(path: Path, size: int | None, what: str) -> int:
    """A file descriptor on a staged file. Raises ImageError when it is no file of the declared size."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise ImageError(f"{what}: {exc.strerror}") from exc
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or size not in (None, info.st_size):
        os.close(fd)
        raise ImageError(f"{what} has {info.st_size} bytes, its manifest says {size}")
    return fd


def give(folder: Path, settings: ImageSettings) -> None:
    """Make a folder for the unprivileged user, in one of root's."""
    folder.mkdir(mode=0o700)
    os.chown(folder, settings.uid, settings.gid)


async def work(
    fd: int, job: dict[str, Any], folder: Path, settings: ImageSettings, what: str
) -> dict[str, Any]:
    """Run the worker on `fd` in `folder`, which its user owns. Raises what the worker reports."""
    limits = settings.limits
    job = {**job, "uid": settings.uid, "gid": settings.gid, "file_size": limits.max_layer}
    argv = [
        "unshare",
        "-n",
        "--",
        sys.executable,
        "-P",
        "-s",
        "-B",
        "-m",
        "hyperpod.image.worker",
        json.dumps(job),
    ]
    answers: list[dict[str, Any]] = []

    def line(raw: bytes) -> None:
        try:
            message = json.loads(raw)
        except ValueError as exc:
            raise ImageError(f"{what}: the converter says {printable(raw, 100)!r}") from exc
        if isinstance(message, dict) and "progress" not in message:
            answers[:] = [message]

    finished = await run(
        argv,
        what=what,
        cwd=folder,
        env={"PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), "PYTHONPATH": _CODE},
        stall=settings.stall_timeout,
        alive=lambda: None,
        stdin=fd,
        max_stdout=_LINE,
        on_line=line,
    )
    answer = answers[0] if answers else {}
    if isinstance(result := answer.get("ok"), dict):
        return result
    if text := answer.get("error"):
        kind = getattr(errors, str(answer.get("kind")), ImageError)
        raise (kind if isinstance(kind, type) and issubclass(kind, HyperpodError) else ImageError)(
            f"{what}: {text}"
        )
    tail = printable(finished.stderr, 400).strip()
    raise ImageError(f"{what}: the converter ended with code {finished.code}: {tail}")


class LayerFiles:
    """The layers folder: files named by naming.py, mode 0440."""

    def __init__(self, root: Path, settings: ImageSettings) -> None:
        self.root, self._settings = root, settings
        self._slots = asyncio.Semaphore(settings.max_concurrent_conversions)
        self._locks: dict[str, asyncio.Lock] = {}

    async def ensure(
        self,
        blob: Path,
        declared: Blob | None,
        diff_id: str,
        folder: Path,
        *,
        what: str,
        below: Sequence[Path] | None,
    ) -> Converted | Waiting:
        """Verify the blob and have its layer file. `declared` None: an archive, which has no blob digests.

        `below`: folders that the layers below it were converted in, topmost first; None: they are not yet."""
        fd = await asyncio.to_thread(open_blob, blob, declared.size if declared else None, what)
        try:
            lock = self._locks.setdefault(diff_id, asyncio.Lock())
            async with lock, self._slots:
                await asyncio.to_thread(give, folder, self._settings)
                job = self._job(declared, diff_id, below)
                return await self._convert(fd, job, folder, what)
        finally:
            os.close(fd)

    def _job(self, declared: Blob | None, diff_id: str, below: Sequence[Path] | None) -> dict[str, Any]:
        limits = self._settings.limits
        return {
            "mode": "convert",
            "diff_id": diff_id,
            "blob_digest": declared.digest if declared else "",
            "layers": str(self.root),
            "below": None if below is None else [str(one / _TREE) for one in below],
            "tree": _TREE,
            "output": _OUTPUT,
            "compressor": self._settings.compressor,
            "max_layer": limits.max_layer,
            "max_ratio": limits.max_ratio,
            "ratio_floor": limits.ratio_floor,
            "max_entries": limits.max_entries,
            "max_metadata": limits.max_metadata,
        }

    async def _convert(self, fd: int, job: dict[str, Any], folder: Path, what: str) -> Converted | Waiting:
        result = await work(fd, job, folder, self._settings, what)
        opaque_root = result["opaque_root"] is True
        if result["waits"] is True:
            return Waiting(opaque_root)
        diff_id, variant = str(job["diff_id"]), str(result["variant"])
        if variant and not _VARIANT.fullmatch(variant):
            raise ImageError(f"{what}: the converter answered nonsense")
        path, built = self.root / layer_file(diff_id, variant), result["built"] is True
        if built:
            await asyncio.to_thread(self._install, folder / _OUTPUT, path)
        file_size = path.stat().st_size
        log.info("%s: %s, %d bytes", what, "built" if built else "here already, verified", file_size)
        layer = LayerRef(name=layer_name(diff_id, variant), file=path.name, size=file_size)
        return Converted(layer, int(result["size"]), opaque_root)

    def _install(self, built: Path, path: Path) -> None:
        """Move exactly the file that was checked, whatever its owner does to the name meanwhile.

        Raises ImageError when somebody has it open for writing: what a guest, or for
        a host pod the host's kernel, has mounted would change under it."""
        fd = open_blob(built, None, "the built layer")
        root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fchown(fd, 0, self._settings.layer_gid)
            os.fchmod(fd, 0o440)
            _need_no_writer(fd, built)
            os.fsync(fd)
            # With dst_dir_fd this is linkat(AT_SYMLINK_FOLLOW), without it link(2) of the symlink itself.
            os.link(f"/proc/self/fd/{fd}", path.name, dst_dir_fd=root, follow_symlinks=True)
            os.fsync(root)
        except FileNotFoundError as exc:
            raise NotFound(f"{built} went away") from exc
        except OSError as exc:
            if exc.errno in (28, 122):  # ENOSPC, EDQUOT
                raise ResourceExhausted(f"no room for {path}") from exc
            raise
        finally:
            os.close(root)
            os.close(fd)


def _need_no_writer(fd: int, path: Path) -> None:
    """By a read lease, which the kernel gives for a file that nobody can write to any more (fcntl(2)): nobody may
    open it but root, and a converter that a hostile layer took over is dead, as far as we know.

    Raises ImageError."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as exc:
        if exc.errno == errno.EAGAIN:
            raise ImageError(f"{path.name} is still open for writing after its converter's end") from exc
        log.debug("%s: its file system has no leases: %s", path, exc.strerror)
