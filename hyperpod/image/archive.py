"""Images out of files: OCI layouts (a folder or a tar) and docker archives (`docker save`), for `load`."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperpod.errors import ImageError, InvalidArgument, NotFound
from hyperpod.image import manifest as m
from hyperpod.image.convert import give, work
from hyperpod.image.pull import StagedImage, read_file, staged
from hyperpod.image.reference import Reference, parse
from hyperpod.image.settings import ImageSettings

_NAME_KEYS = ("io.containerd.image.name", "org.opencontainers.image.ref.name")


@dataclass(frozen=True)
class LoadedImage:
    """An image and the names its archive gives it."""

    image: StagedImage
    names: tuple[Reference, ...]


class Source:
    """Files by the name they have in the layout or archive."""

    def __init__(
        self, what: str, settings: ImageSettings, root: Path, files: dict[str, str] | None = None
    ) -> None:
        self.what, self._settings, self._root, self._files = what, settings, root, files

    def path(self, name: str) -> Path:
        """Raises ImageError for a name that is not there or leads out of the layout."""
        if self._files is None:
            path = self._root / name
            if ".." in path.parts or not path.resolve().is_relative_to(self._root.resolve()):
                raise ImageError(f"{self.what}: {name[:200]!r} leads out of the layout")
            if not path.is_file():
                raise ImageError(f"{self.what}: {name[:200]!r} is missing")
            return path.resolve()
        if (file := self._files.get(name.removeprefix("./"))) is None:
            raise ImageError(f"{self.what}: {name[:200]!r} is missing")
        return self._root / file

    def has(self, name: str) -> bool:
        return (self._root / name).is_file() if self._files is None else name in self._files

    def read(self, name: str, size: int | None = None) -> bytes:
        what = f"{self.what}: {name[:200]}"
        return read_file(self.path(name), size, self._settings.limits.max_manifest, what)

    def blob(self, blob: m.Blob) -> bytes:
        """A document by digest. Raises ImageError when its bytes are others."""
        data = self.read(f"blobs/sha256/{blob.hex}", blob.size)
        if m.digest_of(data) != blob.digest:
            raise ImageError(f"{self.what}: blob {blob.digest} has other contents")
        return data


async def open_source(path: Path, folder: Path, settings: ImageSettings) -> Source:
    """A layout folder as it is, an archive taken apart into `folder`. Raises NotFound, ImageError."""
    what = f"load of {path}"
    if path.is_dir():
        return Source(what, settings, path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as exc:
        raise NotFound(f"{what}: no such file") from exc
    except OSError as exc:
        raise InvalidArgument(f"{what}: {exc.strerror}") from exc
    try:
        limits = settings.limits
        job = {"mode": "unpack", "max_members": limits.max_archive_members, "max_total": limits.max_image}
        inside = folder / "files"
        await asyncio.to_thread(give, inside, settings)
        result = await work(fd, job, inside, settings, what)
    finally:
        os.close(fd)
    files = {str(name): str(file) for name, file in result["files"].items()}
    if any("/" in file for file in files.values()):
        raise ImageError(f"{what}: the converter answered nonsense")
    return Source(what, settings, inside, files)


def images(source: Source, settings: ImageSettings) -> list[LoadedImage]:
    """Every image of this platform. Blocking. Raises ImageError."""
    if source.has("manifest.json"):
        return _docker(source)
    if source.has("index.json"):
        return _layout(source, settings)
    raise ImageError(
        f"{source.what}: neither an OCI layout (index.json) nor a docker archive (manifest.json)"
    )


def _layout(source: Source, settings: ImageSettings) -> list[LoadedImage]:
    found: list[LoadedImage] = []
    index = m.parse_json(source.read("index.json"), f"{source.what}: index.json")
    for item in m.items(index, "manifests", source.what):
        blob = m.descriptor(item, source.what)
        raw = source.blob(blob)
        data = m.parse_json(raw, source.what)
        if m.is_index(data):
            raw = source.blob(m.choose(data, source.what))
        manifest = m.read_manifest(raw, source.what, settings.limits)
        config = source.blob(manifest.config)
        files = {x.digest: source.path(f"blobs/sha256/{x.hex}") for x in manifest.layers}
        image = staged(source.what, blob.digest, manifest, config, files)
        notes = item.get("annotations")
        names = [notes[key] for key in _NAME_KEYS if isinstance(notes, dict) and notes.get(key)]
        found.append(LoadedImage(image, (_name(names[0], source),) if names else ()))
    if not found:
        raise ImageError(f"{source.what}: the layout has no images")
    return found


def _docker(source: Source) -> list[LoadedImage]:
    found: list[LoadedImage] = []
    try:
        entries = json.loads(source.read("manifest.json"))
    except (ValueError, RecursionError) as exc:
        raise ImageError(f"{source.what}: manifest.json is no JSON: {exc}") from exc
    if not isinstance(entries, list) or not entries:
        raise ImageError(f"{source.what}: manifest.json lists no images")
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("Config"), str):
            raise ImageError(f"{source.what}: manifest.json has an entry without Config")
        layers = m.items(entry, "Layers", source.what)
        config = source.read(entry["Config"])
        blob = m.Blob(m.digest_of(config), len(config))
        paths = [source.path(str(name)) for name in layers]
        claimed = m.Manifest("", blob, tuple(m.Blob("", 0) for _ in layers))
        parsed, diff_ids = m.read_config(config, claimed, source.what)
        parts = tuple((path, None, diff_id) for path, diff_id in zip(paths, diff_ids, strict=True))
        image = StagedImage(source.what, "", blob.digest, len(config), parsed, parts)
        tags: list[Any] = entry.get("RepoTags") or []
        found.append(LoadedImage(image, tuple(_name(tag, source) for tag in tags)))
    return found


def _name(text: object, source: Source) -> Reference:
    try:
        return parse(str(text))
    except InvalidArgument as exc:
        raise ImageError(f"{source.what}: {exc}") from exc
