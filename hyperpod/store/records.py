"""One folder per object: a frozen record and a versioned status, each a JSON file, written whole.

Layout: `<state>/<kind>/<id>/record.json` and `status.json`. A write is temp file, fsync, rename, fsync of the
folder, in a thread: an fsync takes milliseconds and must not hold the loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from hyperpod.errors import ResourceExhausted
from hyperpod.model.base import Record

log = logging.getLogger(__name__)
R = TypeVar("R", bound=Record)
S = TypeVar("S", bound=Record)


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` durably. Raises ResourceExhausted when the disk is full, OSError otherwise."""
    temp = path.with_name(f".{path.name}.tmp")
    try:
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temp.rename(path)
        sync_folder(path.parent)
    except OSError as exc:
        temp.unlink(missing_ok=True)
        if exc.errno in (28, 122):  # ENOSPC, EDQUOT
            raise ResourceExhausted(
                f"no room for {path}: free space on the disk of the state folder"
            ) from exc
        raise


def sync_folder(path: Path) -> None:
    """Make the entries of a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
        """Write a new object; the record comes last, so a folder without one was never announced."""

        def write() -> None:
            folder = self.folder(ident)
            folder.mkdir(parents=True, exist_ok=True, mode=0o711)
            write_atomic(folder / "status.json", status.model_dump_json().encode())
            write_atomic(folder / "record.json", record.model_dump_json().encode())
            sync_folder(self.root)

        await asyncio.to_thread(write)

    async def update(self, ident: str, status: S) -> None:
        """Replace the status of an object."""
        data = status.model_dump_json().encode()
        await asyncio.to_thread(write_atomic, self.folder(ident) / "status.json", data)

    async def delete(self, ident: str) -> None:
        """Forget an object; unknown ones are fine. The record goes first: half of one is no object."""

        def remove() -> None:
            folder = self.folder(ident)
            (folder / "record.json").unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

        await asyncio.to_thread(remove)

    async def load(self) -> tuple[dict[str, tuple[R, S]], list[str]]:
        """Every readable object by id, and the ids set aside because they were not readable."""
        return await asyncio.to_thread(self._load)

    def _load(self) -> tuple[dict[str, tuple[R, S]], list[str]]:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o711)
        found: dict[str, tuple[R, S]] = {}
        aside: list[str] = []
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
                aside.append(folder.name)
                log.error("unreadable record %s set aside to %s: %s", folder.name, target, exc)
        return found, aside
