"""Signal names as images and CRI write them, to the guest's numbers (Linux x86-64, signal(7))."""

from __future__ import annotations

import re
import signal

from hyperpod.errors import InvalidArgument

SIGRTMIN, SIGRTMAX = 34, 64
"""What container images mean by SIGRTMIN: glibc's, which keeps 32 and 33 for itself."""

_REALTIME = re.compile(r"RT(MIN|MAX)(?:([+-])(\d{1,2}))?\Z")


def number(name: str) -> int:
    """`SIGTERM`, `term`, `15`, `SIGRTMIN+3`, `SIGRTMAX-1` to a number. Raises InvalidArgument."""
    text = name.strip().upper()
    if text.isdecimal() and 0 < int(text) <= SIGRTMAX:
        return int(text)
    short = text.removeprefix("SIG")
    if match := _REALTIME.match(short):
        base = SIGRTMIN if match[1] == "MIN" else SIGRTMAX
        delta = int(match[3] or 0) * (-1 if match[2] == "-" else 1)
        if SIGRTMIN <= base + delta <= SIGRTMAX:
            return base + delta
    else:
        known = getattr(signal.Signals, f"SIG{short}", None)
        if known is not None:
            return int(known)
    raise InvalidArgument(f"no such signal: {name[:40]!r}")
