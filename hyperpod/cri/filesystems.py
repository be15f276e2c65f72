"""The file systems that the image service and the statistics tell of: images, and what containers write."""

from __future__ import annotations

import sys
from pathlib import Path

from hyperpod.agent.quota import walk


def usage(root: Path) -> tuple[int, int]:
    """Bytes on disk and inodes of all below `root`; (0, 0) when it is not there."""
    try:
        return walk(str(root), sys.maxsize)
    except FileNotFoundError:
        return 0, 0


def scratch(state_dir: Path) -> Path:
    """Where the disks for writable layers lie."""
    return state_dir / "scratch"


def scratch_mountpoint(state_dir: Path, images: str) -> str:
    """Of the scratch disks. On one disk both are named alike: the kubelet takes two names for two disks."""
    path = scratch(state_dir)
    try:
        return str(path) if path.stat().st_dev != Path(images).stat().st_dev else images
    except FileNotFoundError:  # before the first pod
        return images
