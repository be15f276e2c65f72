"""A process is found again by its number and its beginning."""

from __future__ import annotations

import os
from pathlib import Path

from hyperpod import processes


def test_a_process_is_told_by_its_beginning(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    assert processes.recall(file) == 0
    own = os.getpid()
    processes.remember(file, own, processes.running_since(own))
    assert processes.recall(file) == own
    processes.remember(file, own, processes.running_since(own) + 1)
    assert processes.recall(file) == 0
    file.write_text("nonsense")
    assert processes.recall(file) == 0


def test_one_that_died_at_once_is_not_there(tmp_path: Path) -> None:
    """Nor while nobody has reaped it: it has no beginning then, and is not one that runs since 0."""
    file = tmp_path / "pid"
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    try:
        processes.remember(file, child, processes.running_since(child))
        assert processes.recall(file) == 0
    finally:
        os.waitpid(child, 0)
    assert processes.recall(file) == 0
