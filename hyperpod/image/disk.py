"""The folders of the store and what a crash may have left in them. Every method blocks."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from hyperpod.errors import FailedPrecondition
from hyperpod.image.settings import ImageSettings
from hyperpod.model.images import Image, StoredImage
from hyperpod.store.records import sync, write_atomic

log = logging.getLogger(__name__)
_SQUASHFS_MAGIC = b"hsqs"


@dataclass(frozen=True)
class ImageFsUsage:
    """What the store takes on the disk that holds `mountpoint`."""

    mountpoint: str
    used_bytes: int
    inodes: int


class StoreDisk:
    """`images/<hex>.json` records, `layers/` block images, `staging/` folders of pulls at work."""

    def __init__(self, state_dir: Path, settings: ImageSettings) -> None:
        self.records = state_dir / "images"
        self.layers = state_dir / "layers"
        self.staging = state_dir / "staging"
        self._aside = state_dir / "unreadable" / "images"
        self._uid = settings.uid

    def prepare(self) -> None:
        """Make the folders, sweep unfinished pulls. Raises FailedPrecondition if pulls cannot work there."""
        for folder, mode in ((self.records, 0o700), (self.layers, 0o711), (self.staging, 0o711)):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(mode)
        for parent in self.staging.resolve().parents:
            if not parent.stat().st_mode & 0o001:
                raise FailedPrecondition(
                    f"{parent} must be passable for uid {self._uid}, which pulls run as: chmod o+x {parent}"
                )
        for left in self.staging.iterdir():
            log.info("sweeping %s, left by a pull that did not end", left)
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()

    def load(self) -> list[StoredImage]:
        """Every record whose layer files are whole; others are set aside and reported."""
        found: list[StoredImage] = []
        for path in sorted(self.records.iterdir()):
            if path.suffix != ".json":
                path.unlink()  # a write that was cut off
                continue
            try:
                record = StoredImage.model_validate_json(path.read_bytes())
                self._verify(record, path)
            except (OSError, ValidationError, ValueError) as exc:
                self._aside.mkdir(parents=True, exist_ok=True, mode=0o700)
                path.rename(self._aside / path.name)
                log.error("image record %s set aside to %s; pull it again: %s", path.name, self._aside, exc)
                continue
            found.append(record)
        return found

    def _verify(self, record: StoredImage, path: Path) -> None:
        if path != self._path(record.image.id):
            raise ValueError(f"it is about {record.image.id}")
        self.check(record.image)

    def check(self, image: Image) -> None:
        """Raises OSError or ValueError when a layer file is not what it was."""
        for layer in image.layers:
            with (self.layers / layer.file).open("rb") as file:
                if file.read(4) != _SQUASHFS_MAGIC or os.fstat(file.fileno()).st_size != layer.size:
                    raise ValueError(f"layer file {layer.file} is damaged")

    def _path(self, image_id: str) -> Path:
        return self.records / f"{image_id.removeprefix('sha256:')}.json"

    def save(self, record: StoredImage) -> None:
        """Raises ResourceExhausted when the disk is full."""
        write_atomic(self._path(record.image.id), record.model_dump_json().encode())

    def forget(self, image_id: str) -> None:
        self._path(image_id).unlink(missing_ok=True)
        sync(self.records)

    def orphans(self, wanted: set[str]) -> list[str]:
        """Layer files that are not in `wanted`."""
        return [name for name in os.listdir(self.layers) if name not in wanted]

    def take_out(self, names: Iterable[str]) -> list[Path]:
        """Rename layer files out of the way: quick, where the removal of a large file is not."""
        moved: list[Path] = []
        for name in names:
            target = self.staging / f"gone-{name}"
            (self.layers / name).rename(target)
            moved.append(target)
            log.info("layer file %s is not used any more", name)
        return moved

    def usage(self) -> ImageFsUsage:
        used = inodes = 0
        for root in (self.records, self.layers, self.staging):
            for folder, _, names in os.walk(root):
                inodes += 1
                for name in names:
                    try:
                        used += (Path(folder) / name).lstat().st_blocks * 512
                    except FileNotFoundError:
                        continue
                    inodes += 1
        return ImageFsUsage(str(self.layers), used, inodes)
