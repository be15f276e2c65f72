"""The rate of the host's time-stamp counter, for emulated guests.

An emulated x86 guest on an x86 host reads the host's counter. It learns the counter's rate by counting it against
an emulated timer, and on a busy host, where its CPU is not always running, the result may be wrong by a factor of
ten: its clock then runs that much too fast for ever. So it is told (`tsc_early_khz=`). KVM tells its guests itself.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import platform
import time

log = logging.getLogger(__name__)

PERIOD = 0.2
"""Seconds between the two looks; each is right to about a microsecond, so the rate is to some 10 ppm."""

LOOKS = 50

# rdtsc; shl rdx, 32; or rax, rdx; ret
_READ_COUNTER = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\xc3"


def measure() -> int:
    """kHz, or 0 where it cannot be known: another machine, or a host that forbids executable memory. Blocks."""
    if platform.machine() != "x86_64":
        return 0
    try:
        memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError as exc:
        log.warning("the time-stamp counter cannot be read (%s): clocks of emulated guests may be off", exc)
        return 0
    with memory:
        memory.write(_READ_COUNTER)
        anchor = ctypes.c_char.from_buffer(memory)
        try:
            read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))
            first = _look(read)
            time.sleep(PERIOD)
            second = _look(read)
        finally:
            del anchor  # the mapping cannot be closed before
    return rate(first, second)


def rate(first: tuple[int, int], second: tuple[int, int]) -> int:
    """kHz of a counter that was looked at twice: (nanoseconds, count) each."""
    return round((second[1] - first[1]) * 1_000_000 / (second[0] - first[0]))


def _look(read: ctypes._FuncPointer) -> tuple[int, int]:
    """Nanoseconds and count of the look that was interrupted least."""
    best, found = 1 << 62, (0, 0)
    for _ in range(LOOKS):
        before = time.monotonic_ns()
        count = read()
        after = time.monotonic_ns()
        if after - before < best:
            best, found = after - before, ((before + after) // 2, count)
    return found
