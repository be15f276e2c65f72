"""Packages from npm for tests, installed once into the cache as the lock file says."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest


def modules(project: Path) -> Path:
    """The folder with `node_modules` for a project folder with package.json and package-lock.json."""
    if shutil.which("npm") is None:
        pytest.fail("npm is not installed: ./dev setup installs it")
    lock = (project / "package-lock.json").read_bytes()
    cache = Path(os.environ.get("HYPERPOD_CACHE", "/var/cache/hyperpod"))
    folder = cache / f"npm-{hashlib.sha256(lock).hexdigest()[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{folder.name}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not (folder / ".complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name in ("package.json", "package-lock.json"):
                shutil.copy(project / name, folder)
            subprocess.run(
                ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=folder, check=True
            )
            (folder / ".complete").touch()
    return folder
