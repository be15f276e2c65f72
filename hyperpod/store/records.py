"""One folder per object: a frozen record and a versioned status, each a JSON file, written whole.

Layout: `<state>/<kind>/<id>/record.json` and `status.json`. A write is temp file, fsync, rename, fsync of the
folder, in a thread: an fsync takes milliseconds and must not hold the loop. What only a successor of this process
has to find needs no fsync: what ends with the host need not be known after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from hyperpod.errors import ResourceExhausted
from hyperpod.model.base import Record

log = logging.getLogger(__name__)
R = TypeVar("R", bound=Record)
S = TypeVar("S", bound=Record)


def write_atomic(path: Path, data: bytes, mode: int = 0o600, *, durable: bool = True) -> None:
    """Replace `path`, for good or for this boot. Raises ResourceExhausted when the disk is full, OSError."""
    temp = f"{path.parent}/.{path.name}.tmp"
    try:
        with _room(path):
            fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()  # a disk that is nearly full takes the beginning of it, and says so at the next write
                if durable:
                    os.fsync(fd)
            os.rename(temp, path)  # noqa: PTH104  pathlib costs more than the call
            if durable:
                sync(path.parent)
    except (OSError, ResourceExhausted):
        with contextlib.suppress(OSError):
            Path(temp).unlink()
        raise


def sync(path: Path) -> None:
    """Make a file, or the entries of a folder, durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _room(path: Path) -> Iterator[None]:
    """Says what a full disk means."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (28, 122):  # ENOSPC, EDQUOT
            raise ResourceExhausted(
                f"no room for {path}: free space on the disk of the state folder"
            ) from exc
        raise


class RecordStore(Generic[R, S]):
    """The objects of one kind."""

    def __init__(self, state_dir: Path, kind: str, record: type[R], status: type[S]) -> None:
        self.root = state_dir / kind
        self._aside = state_dir / "unreadable" / kind
        self._record, self._status = record, status

    def folder(self, ident: str) -> Path:
        """The folder of one object; other small files of the object may live there too."""
        return self.root / ident

    def aside(self, ident: str) -> Path:
        """Where the folder of an object went whose record was not readable."""
        return self._aside / ident

    async def create(self, ident: str, record: R, status: S) -> None:
        """Write a new object; the record comes last, so a folder without one was never announced.

        It is there for a successor of this process; `settle` must return before anything is told or made that
        outlives the host."""

        def write() -> None:
            folder = self.folder(ident)
            folder.mkdir(parents=True, exist_ok=True, mode=0o711)
            write_atomic(folder / "status.json", status.model_dump_json().encode(), durable=False)
            write_atomic(folder / "record.json", record.model_dump_json().encode(), durable=False)

        await asyncio.to_thread(write)

    async def settle(self, ident: str) -> None:
        """Make a new object durable; fine when it is gone again."""
        folder = self.folder(ident)

        def settle() -> None:
            with contextlib.suppress(FileNotFoundError), _room(folder):
                for path in (folder / "record.json", folder / "status.json", folder, self.root):
                    sync(path)

        await asyncio.to_thread(settle)

    async def update(self, ident: str, status: S, *, durable: bool = True) -> None:
        """Replace the status of an object. Not durable: it is superseded before anybody is told."""
        data, path = status.model_dump_json().encode(), self.folder(ident) / "status.json"
        await asyncio.to_thread(write_atomic, path, data, durable=durable)

    async def delete(self, ident: str) -> None:
        """Forget an object; unknown ones are fine. The record goes first: half of one is no object."""

        def remove() -> None:
            folder = self.folder(ident)
            (folder / "record.json").unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

        await asyncio.to_thread(remove)

    async def load(self) -> tuple[dict[str, tuple[R, S]], list[str]]:
        """Every readable object by id, and the ids of all that were set aside, now or ever, as not readable."""
        return await asyncio.to_thread(self._load)

    def _load(self) -> tuple[dict[str, tuple[R, S]], list[str]]:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o711)
        found: dict[str, tuple[R, S]] = {}
        for folder in sorted(self.root.iterdir()):
            if not (folder / "record.json").exists():
                shutil.rmtree(folder, ignore_errors=True)  # create or delete was cut off
                continue
            try:
                record = self._record.model_validate_json((folder / "record.json").read_bytes())
                status = self._status.model_validate_json((folder / "status.json").read_bytes())
                found[folder.name] = (record, status)
            except (OSError, ValidationError, json.JSONDecodeError) as exc:
                self._aside.mkdir(parents=True, exist_ok=True, mode=0o700)
                target = self.aside(folder.name)
                shutil.rmtree(target, ignore_errors=True)
                folder.rename(target)
                log.error("unreadable record %s set aside to %s: %s", folder.name, target, exc)
        return found, sorted(os.listdir(self._aside)) if self._aside.exists() else []
