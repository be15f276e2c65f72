"""What a container needs of images: the layers of its own one, and of those that it has as volumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hyperpod.agentclient import types
from hyperpod.errors import IMAGE_VOLUME_FAILED, NotFound
from hyperpod.image.store import ImageStore, LayerFile
from hyperpod.model.container import ContainerRecord
from hyperpod.model.mounts import ImageVolume, Mount
from hyperpod.sandbox.disks import serial_of
from hyperpod.spec.mounts import clean


@dataclass(frozen=True)
class Leased:
    """Layers that the store keeps until the lease is released: of the root, and of each image volume."""

    root: list[LayerFile]
    volumes: list[tuple[Mount, list[LayerFile]]]
    on_host: bool = False
    """Its agent opens the files; a guest's finds their disks by serial."""

    @property
    def files(self) -> list[LayerFile]:
        """All of them, each once."""
        every = [*self.root, *(layer for _, layers in self.volumes for layer in layers)]
        return list({layer.name: layer for layer in every}.values())

    def root_for_agent(self) -> list[types.Layer]:
        return self._for_agent(self.root)

    def volumes_for_agent(self) -> list[types.ImageVolume]:
        return [
            types.ImageVolume(
                clean(mount.container_path), tuple(self._for_agent(layers)), mount.image_sub_path
            )
            for mount, layers in self.volumes
        ]

    def _for_agent(self, layers: Sequence[LayerFile]) -> list[types.Layer]:
        return [types.Layer(serial_of(x.name), x.path if self.on_host else "", x.fstype) for x in layers]


def resolve(mounts: Sequence[Mount], images: ImageStore) -> tuple[ImageVolume, ...]:
    """The images that the mounts name. Raises NotFound, InvalidArgument for an ambiguous prefix of an id."""
    found = []
    for number, mount in enumerate(mounts):
        if mount.image is None:
            continue
        image = images.get(mount.image.image)
        if image is None:
            raise NotFound(
                f"{IMAGE_VOLUME_FAILED}: config.mounts[{number}].image: image {mount.image.image[:200]!r} is not "
                "here; pull it first"
            )
        layers = tuple(layer.name for layer in image.layers)
        found.append(ImageVolume(mount=number, image_id=image.id, layers=layers))
    return tuple(found)


def lease(record: ContainerRecord, images: ImageStore, *, on_host: bool) -> Leased:
    """Until `images.release` of the container's id, also when this raises NotFound half-way."""
    return Leased(
        root=images.lease(record.image_id, record.id),
        volumes=[
            (record.config.mounts[volume.mount], images.lease(volume.image_id, record.id))
            for volume in record.image_volumes
        ],
        on_host=on_host,
    )
