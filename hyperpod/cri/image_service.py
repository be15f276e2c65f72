"""runtime.v1.ImageService over the image store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.config import Config
from hyperpod.cri import convert, filesystems, replies, stats_replies
from hyperpod.cri.guard import guarded
from hyperpod.cri.ports import Ports
from hyperpod.errors import InvalidArgument
from hyperpod.model.images import Image
from hyperpod.spec.place import HANDLERS


@guarded
class ImageService(cri.ImageServiceBase):
    """Raises hyperpod errors only; the server's interceptor maps them."""

    def __init__(self, ports: Ports, config: Config) -> None:
        self._images = ports.images
        self._state_dir = config.state_dir

    def _matching(self, wanted: cri.ImageFilter | None) -> list[Image]:
        if wanted is None or wanted.image is None or not wanted.image.image:
            return list(self._images.list())
        found = self._images.get(convert.image_name(wanted.image))
        return [found] if found is not None else []

    async def list_images(self, message: cri.ListImagesRequest) -> cri.ListImagesResponse:
        return cri.ListImagesResponse(images=[replies.image(item) for item in self._matching(message.filter)])

    async def stream_images(
        self, message: cri.StreamImagesRequest
    ) -> AsyncIterator[cri.StreamImagesResponse]:
        for page in replies.pages([replies.image(item) for item in self._matching(message.filter)]):
            yield cri.StreamImagesResponse(images=page)

    async def image_status(self, message: cri.ImageStatusRequest) -> cri.ImageStatusResponse:
        """OK without an image for an unknown one, as the kubelet expects."""
        found = self._images.get(convert.image_name(message.image))
        if found is None:
            return cri.ImageStatusResponse()
        info = replies.image_info(found) if message.verbose else {}
        return cri.ImageStatusResponse(image=replies.image(found), info=info)

    async def pull_image(self, message: cri.PullImageRequest) -> cri.PullImageResponse:
        name = convert.image_name(message.image)
        handler = message.image.runtime_handler if message.image is not None else ""
        if handler not in HANDLERS:
            raise InvalidArgument(
                f"image.runtime_handler is {handler[:100]!r}; there are {', '.join(map(repr, HANDLERS))}"
            )
        image = await self._images.pull(name, convert.auth(message.auth))
        return cri.PullImageResponse(image_ref=image.id)

    async def remove_image(self, message: cri.RemoveImageRequest) -> cri.RemoveImageResponse:
        await self._images.remove(convert.image_name(message.image))
        return cri.RemoveImageResponse()

    async def image_fs_info(self, message: cri.ImageFsInfoRequest) -> cri.ImageFsInfoResponse:
        """Images in the store; containers write to the scratch disks of their pods."""
        images = await self._images.fs_info()
        used, inodes = await asyncio.to_thread(filesystems.usage, filesystems.scratch(self._state_dir))
        mountpoint = filesystems.scratch_mountpoint(self._state_dir, images.mountpoint)
        return cri.ImageFsInfoResponse(
            image_filesystems=[stats_replies.filesystem(images.mountpoint, images.used_bytes, images.inodes)],
            container_filesystems=[stats_replies.filesystem(mountpoint, used, inodes)],
        )
