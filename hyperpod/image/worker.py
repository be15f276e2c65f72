"""The converter's process: `python -m hyperpod.image.worker JOB`, a layer blob on file descriptor 0.

It is started as root without network, drops to the job's uid before it reads a byte of the blob, and writes
only into its working folder. On stdout: JSON lines, {"progress": bytes}, at last {"ok": {...}} or
{"error": text, "kind": name of an exception in hyperpod.errors}.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from hyperpod.errors import HyperpodError, ImageError, ResourceExhausted
from hyperpod.image.naming import layer_file
from hyperpod.image.rootinode import set_root
from hyperpod.image.stream import Blob
from hyperpod.image.unpack import unpack
from hyperpod.logs import printable
from hyperpod.spec.layers import LayerTree, Plan
from hyperpod.spec.layertar import Copy, emit
from hyperpod.spec.parents import inherit, told
from hyperpod.spec.tarindex import TarParser

MEMORY = 4 << 30
"""Address space of the process, bytes: 600,000 entries take 0.9 GB, sqfstar 0.3 GB more."""
CPU_SECONDS = 3600
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38


def say(message: dict[str, Any]) -> None:
    """One line to the daemon."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def confine(uid: int, gid: int, file_size: int) -> None:
    """Give up root for good. Everything imported later would be read as `uid`, so nothing is."""
    libc = ctypes.CDLL(None, use_errno=True)
    os.umask(0o077)
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit fails with EFBIG instead
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    for option, argument in ((_PR_SET_NO_NEW_PRIVS, 1), (_PR_SET_PDEATHSIG, signal.SIGKILL)):
        if libc.prctl(option, argument, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl {option}")


class Progress:
    """At most a line per second: it tells the daemon's stall clock that work goes on."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def at(self, count: int) -> None:
        now = time.monotonic()
        if now - self._last >= 1.0:
            self._last = now
            say({"progress": count})


def index(blob: Blob, job: dict[str, Any]) -> tuple[Plan, int]:
    """Pass 1: the plan and the uncompressed size. Raises ImageError when a digest does not match."""
    parser = TarParser(max_entries=job["max_entries"], max_metadata=job["max_metadata"])
    tree = LayerTree(max_nodes=2 * job["max_entries"])
    hashed, size, progress = hashlib.sha256(), 0, Progress()
    allowed = min(job["max_layer"], max(job["ratio_floor"], job["max_ratio"] * blob.size))
    for piece in blob.pieces():
        size += len(piece)
        if size > allowed:
            raise ResourceExhausted(
                f"the layer unpacks to more than {allowed} bytes from {blob.size} "
                f"(caps: {job['max_layer']} bytes, ratio {job['max_ratio']} past {job['ratio_floor']} bytes)"
            )
        hashed.update(piece)
        for entry in parser.feed(piece):
            tree.add(entry)
        progress.at(size)
    if job["blob_digest"] and blob.digest != job["blob_digest"]:
        raise ImageError(f"the blob's digest is {blob.digest}, its manifest says {job['blob_digest']}")
    if (diff_id := f"sha256:{hashed.hexdigest()}") != job["diff_id"]:
        raise ImageError(f"the layer's diff id is {diff_id}, its configuration says {job['diff_id']}")
    parser.finish()
    return tree.plan(), size


def build(blob: Blob, plan: Plan, job: dict[str, Any]) -> None:
    """Pass 2: the canonical tar through sqfstar into `output`."""
    own = {os.getuid(), os.getgid()}
    unused = (number for number in count(1 << 20) if number not in plan.ids)
    aliases = {number: next(unused) for number in own & plan.ids}  # see rootinode
    errors = os.memfd_create("builder")  # no file: the disk may be full
    command = ["sqfstar", "-comp", job["compressor"], "-no-progress", "-quiet", "-mem", "256M"]
    command += ["-noI", "-mkfs-time", "0", job["output"]]  # -noI: for set_root
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=errors, stderr=errors)
    assert child.stdin is not None
    try:
        _feed(blob, emit(plan, aliases), child.stdin.fileno())
        child.stdin.close()
    except BrokenPipeError:
        pass  # the builder's exit code and its log say why
    except BaseException:
        child.kill()
        raise
    finally:
        code = child.wait()
    text = printable(os.pread(errors, 1 << 16, 0), 400).strip()
    if code != 0:
        if "No space left" in text or "Disk quota" in text or "File too large" in text:
            raise ResourceExhausted(f"no room for the layer's image: {text}")
        raise ImageError(f"the image builder failed with code {code}: {text}")
    root = plan.root
    with Path(job["output"]).open("r+b") as image:
        set_root(
            image,
            mode=root.mode,
            uid=root.uid,
            gid=root.gid,
            mtime=root.mtime,
            own=own,
            aliases={alias: true for true, alias in aliases.items()},
        )


def _feed(blob: Blob, pieces_of_tar: Iterator[bytes | Copy], out: int) -> None:
    pieces = blob.pieces()
    piece, start = memoryview(b""), 0  # start: offset of `piece` in the uncompressed stream
    progress = Progress()
    pending = bytearray()
    for item in pieces_of_tar:
        if isinstance(item, bytes):
            pending += item
            if len(pending) < 1 << 16:
                continue
            _write(out, pending)
            pending = bytearray()
            continue
        _write(out, pending)
        pending = bytearray()
        at, end = item.offset, item.offset + item.size
        while at < end:
            if at >= start + len(piece):
                start += len(piece)
                if (data := next(pieces, None)) is None:
                    raise ImageError("the layer ends within a file")
                piece = memoryview(data)
                progress.at(start)
                continue
            part = piece[at - start : end - start]
            _write(out, part)
            at += len(part)
    _write(out, pending)


def _write(out: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(out, view) :]


def _trees(paths: Iterable[str]) -> Iterator[Iterator[bytes]]:
    """What other layers told, one open file at a time."""
    for path in paths:
        with Path(path).open("rb") as tree:
            yield _heeded(tree)


def _heeded(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Tells the daemon that they pass."""
    progress = Progress()
    for number, line in enumerate(lines):
        progress.at(number)
        yield line


def convert(job: dict[str, Any]) -> dict[str, Any]:
    """Verify, and build unless the layer is here already. `waits`: not yet, it has to know the layers below it;
    `variant`: what it has from them (spec/parents.py)."""
    blob = Blob(0)
    plan, size = index(blob, job)
    with Path(job["tree"]).open("wb") as tree:
        tree.writelines(_heeded(told(plan)))
    answer = {"size": size, "opaque_root": plan.opaque_root, "waits": job["below"] is None and plan.implies}
    if answer["waits"]:
        return answer
    variant = inherit(plan, _trees(job["below"] or ()))
    built = not (Path(job["layers"]) / layer_file(job["diff_id"], variant)).exists()
    if built:
        build(blob, plan, job)
    return {**answer, "variant": variant, "built": built}


def main() -> int:
    job = json.loads(sys.argv[1])
    confine(job["uid"], job["gid"], job["file_size"])
    try:
        result = unpack(0, job) if job["mode"] == "unpack" else convert(job)
    except HyperpodError as exc:
        say({"error": str(exc), "kind": type(exc).__name__})
    except MemoryError:
        say({"error": f"the layer needs more than {MEMORY} bytes of memory", "kind": "ResourceExhausted"})
    except OSError as exc:
        say({"error": f"converter: {exc}", "kind": "ResourceExhausted" if exc.errno in (27, 28, 122) else ""})
    else:
        say({"ok": result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
