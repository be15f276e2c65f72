"""Takes the files out of a docker or OCI archive, inside the converter's confined process.

The members become files m0, m1, ... in the working folder: no name of the archive ever reaches the file
system. The names are handed back, links among them resolved (old docker archives link equal layers).
"""

from __future__ import annotations

import os
import posixpath
from typing import Any

from hyperpod.errors import ImageError, ResourceExhausted
from hyperpod.image.stream import Blob
from hyperpod.spec.layers import FILE, HARD_LINK, SYMLINK
from hyperpod.spec.tarindex import Entry, TarParser


def unpack(fd: int, job: dict[str, Any]) -> dict[str, Any]:
    """{"files": {member name: file name}}. Raises ImageError, ResourceExhausted, OSError."""
    parser = TarParser(max_entries=job["max_members"], max_metadata=job["max_members"] * 1024)
    found: dict[str, str] = {}
    links: dict[str, str] = {}
    waiting: list[Entry] = []
    out, left, total, start, count = -1, 0, 0, 0, 0
    for piece in Blob(fd).pieces():
        waiting += parser.feed(piece)
        end = start + len(piece)
        at = start
        while at < end:
            if left:
                part = memoryview(piece)[at - start : at - start + left]
                written = os.write(out, part)
                left -= written
                at += written
                if not left:
                    os.close(out)
                continue
            if not waiting or waiting[0].offset > end:
                break
            entry = waiting.pop(0)
            name = _name(entry.name)
            if entry.kind == FILE:
                total += entry.size
                if total > job["max_total"]:
                    raise ResourceExhausted(f"the archive holds more than {job['max_total']} bytes")
                file, count = f"m{count}", count + 1
                found[name] = file
                out = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                at, left = max(at, entry.offset), entry.size
                if not left:
                    os.close(out)
            elif entry.kind == SYMLINK:
                links[name] = _name(
                    posixpath.join(posixpath.dirname(name), entry.link.decode(errors="replace"))
                )
            elif entry.kind == HARD_LINK:
                links[name] = _name(entry.link)
        start = end
    parser.finish()
    for name, target in links.items():
        if target in found:
            found.setdefault(name, found[target])
    if not found:
        raise ImageError("the archive holds no files")
    return {"files": found}


def _name(raw: bytes | str) -> str:
    text = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
    return posixpath.normpath("/" + text).lstrip("/")
