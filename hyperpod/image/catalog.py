"""The images that are known, in memory: look-up by any reference or id, tags that move."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from hyperpod.errors import InvalidArgument
from hyperpod.image.reference import id_prefix, parse
from hyperpod.model.images import Image, StoredImage


class Catalog:
    """Records by image id; a removed image is not found by look-ups, only by `record`."""

    def __init__(self) -> None:
        self._records: dict[str, StoredImage] = {}

    def put(self, record: StoredImage) -> None:
        self._records[record.image.id] = record

    def drop(self, image_id: str) -> None:
        self._records.pop(image_id, None)

    def record(self, image_id: str) -> StoredImage | None:
        return self._records.get(image_id)

    def records(self) -> list[StoredImage]:
        return list(self._records.values())

    def images(self) -> list[Image]:
        """Without removed ones, oldest first."""
        live = [record for record in self._records.values() if not record.removed]
        return [record.image for record in sorted(live, key=lambda r: (r.updated_at, r.image.id))]

    def find(self, text: str) -> Image | None:
        """By tag, digest, short name, id or its prefix. Raises InvalidArgument for an ambiguous one."""
        images = self.images()
        record = self._records.get(text)  # a whole id is never taken for a tag of a repository named sha256
        if record is not None and not record.removed:
            return record.image
        try:
            reference = parse(text)
        except InvalidArgument:
            reference = None
        if reference is not None:
            wanted = str(reference)
            for image in reversed(images):
                if wanted in image.repo_digests or reference.tagged in image.repo_tags:
                    return image
        if (digits := id_prefix(text)) is None:
            return None
        hits = [image for image in images if image.id.startswith(f"sha256:{digits}")]
        if len(hits) > 1:
            raise InvalidArgument(
                f"image id {text!r} is ambiguous: {len(hits)} start with it; give more digits"
            )
        return hits[0] if hits else None

    def merge(self, fresh: Image, now: int) -> list[StoredImage]:
        """Records to be written, in this order, so that `fresh` is known and has its tags alone."""
        old = self._records.get(fresh.id)
        if old is not None and not old.removed:
            fresh = fresh.model_copy(
                update={
                    "repo_tags": _union(old.image.repo_tags, fresh.repo_tags),
                    "repo_digests": _union(old.image.repo_digests, fresh.repo_digests),
                    "pinned": old.image.pinned,
                }
            )
        changed = [StoredImage(image=fresh, updated_at=now)]
        for record in self._records.values():
            kept = tuple(tag for tag in record.image.repo_tags if tag not in fresh.repo_tags)
            if record.image.id != fresh.id and kept != record.image.repo_tags:
                image = record.image.model_copy(update={"repo_tags": kept})
                changed.append(record.model_copy(update={"image": image}))
        return changed


def known_as(image: Image, asked: Iterable[str]) -> tuple[str, str]:
    """Tag and repo digest to tell users of it: what they asked for, else of the same repository, else the first;
    empty when it has none."""
    tags: list[str] = []
    digests: list[str] = []
    for text in asked:
        with contextlib.suppress(InvalidArgument):
            wanted = parse(text)
            tags += [x for x in image.repo_tags if x == wanted.tagged]
            tags += [x for x in image.repo_tags if x.startswith(f"{wanted.name}:")]
            digests += [x for x in image.repo_digests if x == str(wanted)]
            digests += [x for x in image.repo_digests if x.startswith(f"{wanted.name}@")]
    return next(iter([*tags, *image.repo_tags]), ""), next(iter([*digests, *image.repo_digests]), "")


def _union(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    return first + tuple(item for item in second if item not in first)
