"""One pull: reference to digest, manifest and sizes checked, then the blobs copied into a folder."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from hyperpod.errors import ImageError, ResourceExhausted
from hyperpod.image import manifest as m
from hyperpod.image.bearer import TokenProxy
from hyperpod.image.convert import give, open_blob
from hyperpod.image.process import run
from hyperpod.image.reference import Reference
from hyperpod.image.settings import ImageSettings
from hyperpod.image.skopeo import Skopeo, explain, host_of, is_for, is_loopback, location
from hyperpod.model.images import ImageConfig, RegistryAuth

log = logging.getLogger(__name__)
_SLACK = 1 << 20
"""Bytes beyond the declared sizes that a copy may take: manifests and skopeo's own files."""


@dataclass(frozen=True)
class StagedImage:
    """An image whose blobs lie in files, nothing of it verified but manifest and configuration."""

    what: str
    digest: str
    """Of the index if there is one, else of the manifest; empty for a docker archive."""
    config_digest: str
    config_size: int
    config: ImageConfig
    layers: tuple[tuple[Path, m.Blob | None, str], ...]
    """Lowest first: file, descriptor, diff id claimed by the configuration."""


def staged(
    what: str, digest: str, manifest: m.Manifest, config: bytes, files: dict[str, Path]
) -> StagedImage:
    """Put the parts together; `files` by blob digest. Raises ImageError."""
    parsed, diff_ids = m.read_config(config, manifest, what)
    layers = tuple((files[x.digest], x, d) for x, d in zip(manifest.layers, diff_ids, strict=True))
    return StagedImage(what, digest, manifest.config.digest, len(config), parsed, layers)


def read_file(path: Path, size: int | None, limit: int, what: str) -> bytes:
    """Contents of a staged file of at most `limit` bytes. Blocking. Raises ImageError."""
    fd = open_blob(path, size, what)
    with os.fdopen(fd, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ImageError(f"{what} has more than {limit} bytes")
    return data


def room(folder: Path, need: int, what: str) -> None:
    """Raises ResourceExhausted when the disk of `folder` has less than `need` bytes free."""
    info = os.statvfs(folder)
    if (free := info.f_bavail * info.f_frsize) < need:
        raise ResourceExhausted(f"{what} needs {need} bytes below {folder}, {free} are free")


class Pull:
    """`folder` belongs to this pull alone; the caller removes it."""

    def __init__(self, reference: Reference, folder: Path, settings: ImageSettings) -> None:
        self.reference, self.folder, self.settings = reference, folder, settings
        self.what = f"pull of {reference}"
        self._skopeo = Skopeo(folder, host_of(reference, settings), settings)

    @contextlib.asynccontextmanager
    async def session(self, auth: RegistryAuth | None) -> AsyncIterator[None]:
        """Ask the registry with these credentials until the end of the block. Raises InvalidArgument."""
        host = self._skopeo.host
        async with contextlib.AsyncExitStack() as stack:
            if auth is not None and auth.registry_token and is_for(auth, host):
                plain = is_loopback(host) or host in self.settings.insecure_registries
                proxy = TokenProxy(host, auth.registry_token, plain=plain)
                await stack.enter_async_context(proxy.serving())
                self._skopeo = Skopeo(self.folder, proxy.address, self.settings)
                auth = proxy.credentials
            await asyncio.to_thread(self._skopeo.prepare, auth)
            yield

    async def resolve(self) -> bytes:
        """The manifest or index that the reference stands for now: who gets it may have the image.

        Raises NotFound, PermissionDenied, Unavailable, DeadlineExceeded, ImageError, as `fetch` does."""
        raw = await self._inspect(self.reference.digest)
        if self.reference.digest not in ("", top := m.digest_of(raw)):
            raise ImageError(f"{self.what}: the registry sent {top} instead")
        return raw

    async def fetch(self, raw: bytes) -> StagedImage:
        """Copy what `resolve` gave. Raises ResourceExhausted, too."""
        limits = self.settings.limits
        top = digest = m.digest_of(raw)
        data = m.parse_json(raw, self.what)
        if m.is_index(data):
            digest = m.choose(data, self.what).digest
            raw = await self._inspect(digest)
            if m.digest_of(raw) != digest:
                raise ImageError(f"{self.what}: the registry sent {m.digest_of(raw)} instead of {digest}")
        manifest = m.read_manifest(raw, self.what, limits)
        total = manifest.config.size + sum({x.digest: x.size for x in manifest.layers}.values())
        room(self.folder, total, self.what)
        log.info("%s: %s, %d layers, %d bytes", self.what, digest, len(manifest.layers), total)
        target = self.folder / "blobs"
        await self._copy(digest, target, total)
        config = await asyncio.to_thread(
            read_file,
            target / manifest.config.hex,
            manifest.config.size,
            limits.max_manifest,
            f"{self.what}: the configuration",
        )
        return staged(self.what, top, manifest, config, {x.digest: target / x.hex for x in manifest.layers})

    async def _inspect(self, digest: str) -> bytes:
        source = location(self.reference, digest, self._skopeo.host)
        what = f"{self.what}: resolving"
        finished = await run(
            self._skopeo.inspect(source),
            what=what,
            cwd=self.folder,
            env=self._skopeo.environment(),
            stall=self.settings.stall_timeout,
            alive=lambda: None,
            max_stdout=self.settings.limits.max_manifest,
        )
        if finished.code != 0:
            raise explain(finished.stderr, what)
        return finished.stdout

    async def _copy(self, digest: str, target: Path, total: int) -> None:
        what = f"{self.what}: copying"
        loop = asyncio.get_running_loop()
        told = loop.time()

        def progress() -> int:
            nonlocal told
            have = _bytes_below(target)
            if have > total + _SLACK:
                raise ImageError(f"{what}: the registry sends more than the {total} bytes of the manifest")
            if loop.time() - told >= self.settings.progress_interval:
                told = loop.time()
                log.info("%s: %d of %d bytes", what, have, total)
            return have

        await asyncio.to_thread(give, target, self.settings)
        finished = await run(
            self._skopeo.copy(location(self.reference, digest, self._skopeo.host), "blobs"),
            what=what,
            cwd=self.folder,
            env=self._skopeo.environment(),
            stall=self.settings.stall_timeout,
            alive=progress,
            max_stdout=self.settings.limits.max_manifest,
        )
        if finished.code != 0:
            raise explain(finished.stderr, what)


def _bytes_below(folder: Path) -> int:
    """Sizes of the files of one flat folder; files that vanish meanwhile do not count."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                total += entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue
    return total
