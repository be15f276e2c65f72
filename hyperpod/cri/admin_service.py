"""The operator's RPCs beside CRI."""

from __future__ import annotations

import base64
from pathlib import Path

from hyperpod.api.gen.hyperpod.admin.v1 import (
    AdminBase,
    ConsoleRequest,
    ConsoleResponse,
    LoadedImage,
    LoadRequest,
    LoadResponse,
    ShellRequest,
    ShellResponse,
)
from hyperpod.cri.guard import guarded
from hyperpod.cri.ports import Ports
from hyperpod.errors import InvalidArgument


@guarded
class AdminService(AdminBase):
    """Served on the CRI socket, whose peers are root anyway."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports

    async def load(self, message: LoadRequest) -> LoadResponse:
        path = Path(message.path)
        if not path.is_absolute() or "\0" in message.path:
            raise InvalidArgument(f"path {message.path[:200]!r} is not an absolute path")
        images = await self._ports.images.load(path)
        return LoadResponse(images=[LoadedImage(id=image.id, tags=list(image.repo_tags)) for image in images])

    async def console(self, message: ConsoleRequest) -> ConsoleResponse:
        sandbox = self._ports.sandboxes.live(self._ports.sandboxes.get(message.pod_sandbox_id).id)
        tail = await sandbox.need_shim().console()
        return ConsoleResponse(tail=base64.b64decode(tail))

    async def shell(self, message: ShellRequest) -> ShellResponse:
        url = self._ports.streams.shell(message.pod_sandbox_id, tty=message.tty, term=message.term)
        return ShellResponse(url=url)
