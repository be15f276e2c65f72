"""Built things in a cache outside of the clone: named by a hash of what went in, made once, never half there.

Used by the builders of the guest kernel and of the guest root image; standard library only, because they run
before the project's virtual environment exists.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


class BuildError(Exception):
    """A build cannot go on; the text says why and what to do."""


def cache_dir() -> Path:
    """Where built things live: $HYPERPOD_CACHE, else root's or the user's cache folder, as in the dev script.

    Root's is not below /root: QEMU runs as a user of its own and must reach kernel and image.
    """
    named = os.environ.get("HYPERPOD_CACHE")
    if named:
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/cache/hyperpod")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hyperpod"


def hash_inputs(inputs: dict[str, object]) -> str:
    """16 hex digits that name the inputs of a build; `inputs` must be plain JSON."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_complete(path: Path) -> bool:
    """True when the build at `path` was published whole (the manifest is in it)."""
    return (path / "manifest.json").is_file()


@contextlib.contextmanager
def publishing(path: Path) -> Iterator[Path | None]:
    """Give a private folder to build in, and make it `path` in one rename when the block ends well.

    Yields None when `path` is there already, perhaps made by another process while this one waited for the lock.
    The lock is a flock, so it dies with its holder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{path.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another build of {path.name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if is_complete(path):
            yield None
            return
        for stale in path.parent.glob(f".{path.name}.tmp-*"):  # of a build that was killed: the lock is ours
            shutil.rmtree(stale)
        build = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
        try:
            yield build
            build.chmod(0o755)
            if path.exists():
                shutil.rmtree(path)
            build.rename(path)
        finally:
            if build.exists():
                shutil.rmtree(build)


def write_manifest(folder: Path, manifest: dict[str, object]) -> None:
    """Write manifest.json (what the daemon reads) and VERSION into `folder`."""
    (folder / "VERSION").write_text(f"{manifest['version']}\n")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def say(text: str) -> None:
    """A line of progress for a person, on stderr: stdout is for the answer (a path)."""
    print(text, file=sys.stderr, flush=True)
