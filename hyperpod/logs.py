"""Logging: one line per event on stderr, `key=value` fields, nothing from a guest unescaped."""

from __future__ import annotations

import logging
import re
import sys

FORMAT = "%(asctime)s.%(msecs)03d %(levelname).1s %(name)s: %(message)s"


_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")
"""What may end a line, or mean something to a terminal."""


class _OneLine(logging.Formatter):
    """A message is one line, whatever text of a guest or an image it quotes: none may look like another event, nor
    speak to the terminal of who reads it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the name that logging calls
        record.message = _CONTROL.sub(lambda found: repr(found[0])[1:-1], record.message)
        return super().formatMessage(record)


def setup(level: str = "info", process: str = "") -> None:
    """Route all logging of this process to stderr; `process` is put before each line's logger name."""
    fmt = FORMAT.replace("%(name)s", f"{process} %(name)s") if process else FORMAT
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine(fmt, datefmt="%Y-%m-%dT%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("hpack", "asyncio"):
        logging.getLogger(noisy).setLevel("WARNING")


def printable(data: bytes | str, limit: int = 2048) -> str:
    """The last `limit` bytes of untrusted text with everything unprintable escaped."""
    raw = data.encode(errors="replace") if isinstance(data, str) else data
    raw = raw[-limit:]
    return "".join(chr(b) if 32 <= b < 127 else ("\n" if b == 10 else f"\\x{b:02x}") for b in raw)
