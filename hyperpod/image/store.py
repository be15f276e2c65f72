"""The durable image store: pulls and loads, look-ups, removal, leases.

A record is written whole before an image is announced, after its layer files are on disk; it goes before its
layers do. So a crash leaves at worst layer files without a record, and `open` removes those. Layers of an
image that containers use stay, though the image was removed, until the last lease is released.
"""

from __future__ import annotations

import asyncio
import builtins
import hashlib
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from hyperpod.errors import NotFound, ResourceExhausted
from hyperpod.image.archive import images as images_of
from hyperpod.image.archive import open_source
from hyperpod.image.catalog import Catalog
from hyperpod.image.convert import Converted, LayerFiles, Waiting
from hyperpod.image.disk import ImageFsUsage, StoreDisk
from hyperpod.image.manifest import digest_of
from hyperpod.image.naming import diff_of
from hyperpod.image.pull import Pull, StagedImage
from hyperpod.image.reference import Reference, parse
from hyperpod.image.settings import ImageSettings
from hyperpod.model.base import now_ns
from hyperpod.model.images import Image, LayerRef, RegistryAuth, StoredImage
from hyperpod.tasks import Operations, TaskOwner, bounded

log = logging.getLogger(__name__)
__all__ = ["ImageFsUsage", "ImageStore", "LayerFile"]


@dataclass(frozen=True)
class LayerFile:
    """A layer as a disk for a VM; `size` in bytes."""

    name: str
    path: str
    fstype: str
    size: int


class ImageStore:
    """All methods belong to one event loop. `open` first, then leases, then `collect`; `close` last."""

    def __init__(self, state_dir: Path, run_dir: Path, settings: ImageSettings) -> None:
        del run_dir  # nothing of the store is volatile
        self._settings = settings
        self._disk = StoreDisk(state_dir, settings)
        self._files = LayerFiles(self._disk.layers, settings)
        self._catalog = Catalog()
        self._owner = TaskOwner("images")
        self._operations = Operations(self._owner)
        self._slots = asyncio.Semaphore(settings.max_concurrent_pulls)
        self._write = asyncio.Lock()
        self._leases: dict[str, dict[str, tuple[LayerRef, ...]]] = {}
        """Owner to image id to layers."""
        self._pins: Counter[str] = Counter()
        """Diff ids of pulls at work: their layer files have no record yet."""
        self._carried: set[str] = set()
        """Images that were removed before this start, kept for the leases that come back until `collect`."""

    async def open(self) -> None:
        """Sweep what killed pulls left, load and verify the records. Raises FailedPrecondition."""
        await asyncio.to_thread(self._disk.prepare)
        for record in sorted(await asyncio.to_thread(self._disk.load), key=lambda r: r.updated_at):
            # A crash while a tag moved leaves it with two images: the later one keeps it.
            if record.removed:
                self._carried.add(record.image.id)
            else:
                for changed in self._catalog.merge(record.image, record.updated_at)[1:]:
                    await self._put(changed)
            self._catalog.put(record)
        await self._sweep()

    async def close(self) -> None:
        """Cancel pulls and wait for the end of their helper programs."""
        await self._owner.close()

    async def _put(self, record: StoredImage) -> None:
        await asyncio.to_thread(self._disk.save, record)
        self._catalog.put(record)

    def get(self, ref_or_id: str) -> Image | None:
        """By tag, digest, short name, id with or without sha256:, or unique id prefix; None when unknown.

        Raises InvalidArgument for an ambiguous prefix."""
        return self._catalog.find(ref_or_id)

    def list(self) -> list[Image]:
        """All images, the one pulled last at the end."""
        return self._catalog.images()

    async def fs_info(self) -> ImageFsUsage:
        """Measured on the disk, work in progress included."""
        return await asyncio.to_thread(self._disk.usage)

    async def pull(self, ref: str, auth: RegistryAuth | None = None) -> Image:
        """Pull, or join the same pull with the same credentials. A caller that leaves does not end it.

        Raises InvalidArgument, NotFound, PermissionDenied, Unavailable, DeadlineExceeded, ResourceExhausted,
        ImageError."""
        reference = parse(ref)
        secret = hashlib.sha256(auth.model_dump_json().encode() if auth else b"").hexdigest()
        name = f"pull {reference} as {secret[:16]}"
        return await self._operations.run(name, lambda: self._pull(reference, auth))

    async def _pull(self, reference: Reference, auth: RegistryAuth | None) -> Image:
        what = f"pull of {reference}"
        async with self._slots, self._folder("pull-") as folder:

            async def fetch_and_build() -> Image:
                pull = Pull(reference, folder, self._settings)
                async with pull.session(auth):
                    top = await pull.resolve()
                    if (known := await self._known(reference, digest_of(top))) is not None:
                        return known
                    staged = await pull.fetch(top)
                return await self._install(staged, (reference,), folder)

            image = await bounded(fetch_and_build(), self._settings.pull_timeout, what)
        log.info("%s: done, image %s, %d layers", what, image.id, len(image.layers))
        return image

    async def _known(self, reference: Reference, digest: str) -> Image | None:
        """The image that came out of this repository under this digest before; it gets the tag. None: fetch it.

        The registry has just shown its manifest for these credentials, and the right to read a manifest is that to
        read its layers, but in this repository alone: what came out of others proves nothing."""
        name = reference.by_digest(digest)
        async with self._write:
            known = next((image for image in self.list() if name in image.repo_digests), None)
            if known is None:
                return None
            try:
                await asyncio.to_thread(self._disk.check, known)
            except (OSError, ValueError) as exc:
                log.error("image %s is damaged and fetched again: %s", known.id, exc)
                return None
            return await self._announce(
                known.model_copy(update={"repo_tags": (reference.tagged,) if reference.tagged else ()})
            )

    async def load(self, path: Path) -> builtins.list[Image]:
        """Images of an OCI layout (folder or tar) or a docker archive. Raises as `pull` does."""
        async with self._slots, self._folder("load-") as folder:
            source = await open_source(path, folder, self._settings)
            loaded = await asyncio.to_thread(images_of, source, self._settings)
            return [await self._install(item.image, item.names, folder) for item in loaded]

    @asynccontextmanager
    async def _folder(self, prefix: str) -> AsyncIterator[Path]:
        """A work folder, gone afterwards whatever happens.

        It is root's: what is made in it for the unprivileged user cannot be swapped, before it is given away, by
        processes of that user that hostile images left behind."""
        folder = Path(tempfile.mkdtemp("", prefix, self._disk.staging))
        try:
            folder.chmod(0o711)
            yield folder
        finally:
            # Shielded: a pull that is cancelled a second time cleans up as well.
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))

    async def _install(self, staged: StagedImage, names: tuple[Reference, ...], folder: Path) -> Image:
        """Build the layers, write the record, announce. Nothing is left of an image that fails."""
        pinned = [diff_id for _, _, diff_id in staged.layers]
        self._pins.update(pinned)
        try:
            converted = await self._build(staged, Path(tempfile.mkdtemp("", "layers-", folder)))
            image = self._describe(staged, names, converted)
            async with self._write:
                return await self._announce(image)
        finally:
            self._pins.subtract(pinned)
            self._sweep_soon()

    async def _announce(self, image: Image) -> Image:
        """Record it and give it with all its names. `_write` is held."""
        for record in self._catalog.merge(image, now_ns()):
            await self._put(record)
        known = self._catalog.record(image.id)
        assert known is not None
        return known.image

    async def _build(self, staged: StagedImage, work: Path) -> builtins.list[Converted]:
        """All layers side by side; then those that have to know the layers below them."""
        work.chmod(0o711)
        made: dict[int, Converted | Waiting] = {}

        async def convert(n: int, below: Sequence[int] | None, folder: str) -> None:
            path, blob, diff_id = staged.layers[n]
            what = f"{staged.what}: layer {n + 1} of {len(staged.layers)}"
            folders = None if below is None else [work / str(one) for one in below]
            made[n] = await self._files.ensure(path, blob, diff_id, work / folder, what=what, below=folders)

        await _together(convert(n, None if n else (), str(n)) for n in range(len(staged.layers)))
        waiting = [n for n, one in made.items() if isinstance(one, Waiting)]
        await _together(convert(n, _seen_from(n, made), f"{n}-again") for n in waiting)
        return [one for _, one in sorted(made.items()) if isinstance(one, Converted)]

    def _describe(
        self, staged: StagedImage, names: tuple[Reference, ...], converted: builtins.list[Converted]
    ) -> Image:
        total = sum(item.size for item in converted)
        if total > (cap := self._settings.limits.max_image):
            raise ResourceExhausted(f"{staged.what}: the layers unpack to {total} bytes, the cap is {cap}")
        layers: dict[str, LayerRef] = {}
        for item in converted:
            if item.opaque_root:
                layers.clear()  # overlayfs has no mark for it on the root: what it hides is left out
            # A layer that occurs twice counts where it is topmost: overlayfs refuses the same folder twice,
            # and whatever the lower copy shows, the upper one shows or hides again.
            layers.pop(item.layer.name, None)
            layers[item.layer.name] = item.layer
        tags = [name.tagged for name in names if name.tagged]
        digests = [name.by_digest(staged.digest) for name in names if staged.digest]
        return Image(
            id=staged.config_digest,
            repo_tags=tuple(dict.fromkeys(tags)),
            repo_digests=tuple(dict.fromkeys(digests)),
            size=staged.config_size + sum(layer.size for layer in layers.values()),
            config=staged.config,
            layers=tuple(layers.values()),
        )

    async def remove(self, ref: str) -> None:
        """Remove the image with all its tags; unknown ones are fine. Raises InvalidArgument if ambiguous."""
        async with self._write:
            image = self.get(ref)
            record = self._catalog.record(image.id) if image else None
            if record is None:
                return
            gone = record.model_copy(update={"removed": True})
            self._catalog.put(gone)  # from here on it cannot be leased
            if gone not in self._unused():  # else it goes at once, which works on a full disk as well
                await self._put(gone)
        await self._sweep()

    def lease(self, image_id: str, owner: str) -> builtins.list[LayerFile]:
        """Keep the layers on disk until `release(owner)`. Raises NotFound.

        A restarted daemon takes the leases of its containers again before `collect`, also those of images
        that were removed meanwhile."""
        record = self._catalog.record(image_id)
        if record is None or (record.removed and image_id not in self._carried):
            raise NotFound(f"no image {image_id[:80]!r}")
        layers = record.image.layers
        self._leases.setdefault(owner, {})[image_id] = layers
        root = self._disk.layers
        return [LayerFile(x.name, str(root / x.file), x.fstype, x.size) for x in layers]

    def release(self, owner: str) -> None:
        """Drop all leases of `owner`; unknown ones are fine."""
        if self._leases.pop(owner, None):
            self._sweep_soon()

    async def collect(self) -> None:
        """Call once after a start, when all leases are taken again: removed images without one go now."""
        self._carried.clear()
        await self._sweep()

    @property
    def sweeping(self) -> bool:
        """Background work is going on: pulls, removals of layer files."""
        return len(self._owner) > 0

    def _unused(self) -> builtins.list[StoredImage]:
        """Removed images that nobody leases."""
        kept = {image_id for held in self._leases.values() for image_id in held} | self._carried
        return [r for r in self._catalog.records() if r.removed and r.image.id not in kept]

    def _orphans(self) -> builtins.list[str]:
        """Layer files that no record, lease or pull at work needs."""
        wanted = {layer.file for record in self._catalog.records() for layer in record.image.layers}
        wanted.update(layer.file for held in self._leases.values() for x in held.values() for layer in x)
        return [name for name in self._disk.orphans(wanted) if self._pins[diff_of(name)] <= 0]

    def _sweep_soon(self) -> None:
        if not self._orphans() and not self._unused():
            return
        try:
            self._owner.spawn("sweep", self._sweep())
        except RuntimeError:
            log.info("closing: layers without use are removed at the next start")

    async def _sweep(self) -> None:
        async with self._write:
            for record in self._unused():
                await asyncio.to_thread(self._disk.forget, record.image.id)
                self._catalog.drop(record.image.id)
            moved = self._disk.take_out(self._orphans())
        for path in moved:
            await asyncio.to_thread(path.unlink, missing_ok=True)


async def _together(work: Iterable[Coroutine[None, None, None]]) -> None:
    """Raises what the first one raises that fails; then the others are cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except BaseExceptionGroup as exc:
        raise exc.exceptions[0] from None


def _seen_from(n: int, made: Mapping[int, Converted | Waiting]) -> builtins.list[int]:
    """The layers below one that it does not hide and that are not hidden from it, topmost first."""
    seen: builtins.list[int] = []
    above = n
    while above and not made[above].opaque_root:
        above -= 1
        seen.append(above)
    return seen
