"""The file systems that the image service and the statistics tell of: images, and what containers write."""

from __future__ import annotations

import os
from pathlib import Path


def usage(root: Path) -> tuple[int, int]:
    """Bytes on disk and inodes of all below `root`; (0, 0) when it is not there."""
    used = inodes = 0
    for folder, _, names in os.walk(root):
        inodes += 1 + len(names)
        for name in names:
            try:
                used += (Path(folder) / name).lstat().st_blocks * 512
            except FileNotFoundError:  # a pod that goes meanwhile
                inodes -= 1
    return used, inodes


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
