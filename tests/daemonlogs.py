"""What daemons said during a test, for the report when it fails: nobody can ask a run that is over."""

from __future__ import annotations

from pathlib import Path

LIMIT = 8000
"""Bytes of each log that are shown, the last ones."""

_running: dict[Path, int] = {}
"""Logs, and where the test began in each."""

_ended: list[tuple[Path, str]] = []
"""Of daemons that were there during this test only."""


def test_begins() -> None:
    _ended.clear()
    for log in _running:
        _running[log] = log.stat().st_size if log.exists() else 0


def follow(log: Path) -> None:
    """Of a daemon that is started."""
    _running[log] = 0


def ends(log: Path) -> None:
    """Of one whose folder is about to be removed."""
    _ended.append((log, _tail(log, _running.pop(log))))


def said() -> list[tuple[Path, str]]:
    """Each log's last lines since the test began."""
    return [*_ended, *((log, _tail(log, begin)) for log, begin in _running.items())]


def _tail(log: Path, begin: int) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(begin, file.seek(0, 2) - LIMIT))
        return file.read().decode(errors="replace")
