"""What ps shows of this process."""

from __future__ import annotations

import ctypes
import os

from hyperpod.processes import stat_fields

_PR_SET_NAME = 15
_libc = ctypes.CDLL(None)


def set_title(name: str, title: str) -> None:
    """What ps and /proc show: `name` (15 bytes) for the thread, `title` as the command line.

    The title is written over the arguments and, if it needs, the environment after them (proc(5), cmdline).
    """
    short = ctypes.create_string_buffer(name.encode()[:15])
    _libc.prctl(_PR_SET_NAME, short, 0, 0, 0)
    fields = stat_fields("self")
    arg_start, arg_end, env_end = int(fields[45]), int(fields[46]), int(fields[48])
    if not arg_start < arg_end <= env_end:
        return
    text = os.fsencode(title)[: env_end - arg_start - 1] + b"\0"
    ctypes.memmove(arg_start, text.ljust(arg_end - arg_start, b"\0"), max(len(text), arg_end - arg_start))
