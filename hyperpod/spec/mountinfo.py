"""Lines of /proc/<pid>/mountinfo (proc(5))."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

_ESCAPE = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True)
class MountPoint:
    """`receives`: mounts made elsewhere in its peer group, or by its master, appear here; `shared`: and back."""

    id: int
    path: str
    readonly: bool
    receives: bool
    shared: bool = False


def parse(table: bytes) -> dict[int, MountPoint]:
    """By mount id. Lines that are none are left out."""
    found = {}
    for line in table.split(b"\n"):
        fields = line.split(b" ")
        if len(fields) < 7 or not fields[0].isdigit():
            continue
        optional = fields[6 : fields.index(b"-", 6)] if b"-" in fields[6:] else []
        found[int(fields[0])] = MountPoint(
            id=int(fields[0]),
            path=os.fsdecode(_ESCAPE.sub(lambda m: bytes([int(m[1], 8)]), fields[4])),
            readonly=b"ro" in fields[5].split(b","),
            shared=any(tag.startswith(b"shared:") for tag in optional),
            receives=any(tag.startswith((b"shared:", b"master:")) for tag in optional),
        )
    return found
