"""Processes that outlive who started them, found again: a pid, and when its process began.

Both together tell it from a later one with the same number.
"""

from __future__ import annotations

from pathlib import Path


def stat_fields(process: str) -> list[bytes]:
    """Of /proc/<process>/stat (proc(5)), from the third on: the second may hold anything. Raises OSError."""
    return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()


def start_time(pid: int) -> int:
    """Clock ticks from boot to the process's start, of one that nobody has reaped yet, too. Raises OSError."""
    return int(stat_fields(str(pid))[19])


def running_since(pid: int) -> int:
    """As `start_time`; 0 when it is dead."""
    try:
        fields = stat_fields(str(pid))
    except OSError:
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def remember(file: Path, pid: int, began: int) -> None:
    """For `recall`. Raises OSError."""
    file.write_text(f"{pid} {began}\n")


def recall(file: Path) -> int:
    """The pid that was written to it; 0 when that process is not there any more, or none was."""
    try:
        pid, began = map(int, file.read_text().split())
    except (OSError, ValueError):
        return 0
    # Of a process that died before anybody could look, no beginning is known.
    return pid if began and running_since(pid) == began else 0
