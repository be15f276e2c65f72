"""What the component tests of images share: a state folder that other users may pass, and a store in it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from hyperpod.image.settings import ImageSettings, Limits
from hyperpod.image.store import ImageStore


@contextlib.contextmanager
def passable_folder() -> Iterator[Path]:
    """pytest's own folders are closed to other users, and pulls run as one."""
    folder = Path(tempfile.mkdtemp("", "hyperpod-image-"))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.asynccontextmanager
async def opened(state: Path, limits: Limits | None = None, **settings: Any) -> AsyncIterator[ImageStore]:
    """An open store; at its end nothing is left in the staging folder."""
    chosen = {"stall_timeout": 60.0, "limits": limits or Limits(), **settings}
    store = ImageStore(state, state / "run", ImageSettings(**chosen))
    await store.open()
    try:
        yield store
    finally:
        await store.close()
    assert not list((state / "staging").iterdir())


def layer_files(state: Path) -> list[str]:
    return sorted(path.name for path in (state / "layers").iterdir())
