"""All containers of the sandbox, by id; operations that go on when their caller leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hyperpod.agent.container import Container
from hyperpod.agent.events import EventLog, Status
from hyperpod.agent.layers import LayerSource
from hyperpod.agent.ocispec import OciSpec, parse_object
from hyperpod.agent.security import Security
from hyperpod.agent.streams import Stream
from hyperpod.agent.tools import Tools
from hyperpod.errors import AlreadyExists, InvalidArgument, NotFound, ResourceExhausted
from hyperpod.tasks import Operations
from hyperpod.wire.stdio import Open

if TYPE_CHECKING:
    from hyperpod.agent.imagemount import ImageVolume
    from hyperpod.agent.shell import Shells

MAX_CONTAINERS = 256
_HEX = frozenset("0123456789abcdef")


def check_id(what: str, value: str, length: int) -> None:
    """Ids become file names. Raises InvalidArgument."""
    if len(value) != length or not _HEX.issuperset(value):
        raise InvalidArgument(f"{what} id is not {length} lower-case hex digits")


class Containers:
    """Each method is one RPC of the agent's API (agent.proto), and raises hyperpod errors."""

    def __init__(self, tools: Tools) -> None:
        self.tools = tools
        self.events = EventLog()
        self._known: dict[str, Container] = {}
        self._operations = Operations(tools.owner)
        self._shells: Shells | None = None

    def __len__(self) -> int:
        return len(self._known)

    def get(self, ident: str) -> Container:
        """Raises NotFound."""
        found = self._known.get(ident)
        if found is None:
            raise NotFound(f"no container {ident[:64]}")
        return found

    def ids(self) -> list[str]:
        return list(self._known)

    def find(self, ident: str) -> Container | None:
        return self._known.get(ident)

    def statuses(self) -> list[Status]:
        return [container.status for container in self._known.values()]

    async def create(
        self,
        ident: str,
        spec: bytes,
        layers: list[LayerSource],
        security: Security | None = None,
        *,
        tty: bool,
        stdin: bool,
        stdin_once: bool,
        share: str = "",
        submounts: Sequence[str] = (),
        image_volumes: Sequence[ImageVolume] = (),
    ) -> Container:
        """One that is there, or being made, is what is asked for again: ids are random, the answer was lost."""
        check_id("container", ident, 64)
        parsed = OciSpec(spec)
        making = self._operations.running(f"create/{ident}")
        if not making and (there := self._known.get(ident)) is not None:
            return there
        if not making and len(self._known) >= MAX_CONTAINERS:
            raise ResourceExhausted(f"there are {MAX_CONTAINERS} containers already")
        made = Container(ident, self.tools, self.events.publish, tty=tty, stdin=stdin, stdin_once=stdin_once)
        if security is not None and security.pid_target:
            made.pid_target = self.get(security.pid_target)

        async def prepare() -> None:
            # Known from the start, so that a Remove that overtakes finds it.
            self._known[ident] = made
            try:
                if share:
                    await self.tools.share.use(share, submounts)
                await made.prepare(parsed, layers, security, image_volumes)
            except BaseException:
                del self._known[ident]
                raise

        await self._operations.run(f"create/{ident}", prepare)
        return self.get(ident)

    async def start(self, ident: str) -> int:
        container = self.get(ident)
        if self._operations.running(f"create/{ident}"):
            await self._operations.wait(f"create/{ident}")
        return await self._operations.run(f"start/{ident}", container.start)

    async def update(self, ident: str, resources: bytes) -> None:
        await self._operations.wait(f"create/{ident}")
        # Not cut off half-way by a caller that leaves.
        document, container = parse_object("the OCI resources", resources), self.get(ident)
        await asyncio.shield(self.tools.owner.spawn(f"update/{ident[:12]}", container.update(document)))

    async def remove(self, ident: str) -> None:
        await self._operations.wait(f"create/{ident}")
        container = self._known.get(ident)
        if container is None:
            return

        async def remove() -> None:
            await container.remove()
            self._known.pop(ident, None)

        await self._operations.run(f"remove/{ident}", remove)

    async def start_exec(
        self, container: str, ident: str, process: bytes, *, tty: bool, stdin: bool, again: bool = False
    ) -> int:
        """Gives the pid. Without a container it is a shell of the operator's.

        `again`: who asks may have asked before and not got the answer, so a start under way is joined."""
        check_id("exec", ident, 32)
        document = parse_object("the OCI process", process)
        if not container:
            return self._operators().start(ident, document, tty=tty, stdin=stdin)
        found = self.get(container)
        name = f"exec/{container}/{ident}"
        if self._operations.running(name) and not again:
            raise AlreadyExists(f"exec {ident} is being started")
        return await self._operations.run(
            name, lambda: found.start_exec(ident, document, tty=tty, stdin=stdin)
        )

    async def remove_exec(self, container: str, ident: str, *, kill: bool) -> None:
        """`kill`: also what an ended one has left in the background, which goes on otherwise."""
        found = self._known.get(container)
        await self._operations.wait(f"exec/{container}/{ident}")
        if found is not None:
            await self._operations.run(
                f"remove-exec/{container}/{ident}", lambda: found.remove_exec(ident, kill=kill)
            )

    def stream(self, what: Open) -> Stream:
        """Raises NotFound."""
        if what.stream == "port":
            from hyperpod.agent.ports import PortStream  # only a pod that is forwarded to pays for it

            return PortStream(self.tools.owner, what.port)
        if not what.container:
            return self._operators().stream(what)
        if what.stream == "process":
            from hyperpod.agent.sessions import ProcessStream

            return ProcessStream(self, what)
        found = self.get(what.container)
        return (found.exec(what.exec_id).io if what.exec_id else found.io).stream(what.stream)

    def _operators(self) -> Shells:
        if self._shells is None:
            from hyperpod.agent.shell import Shells  # most agents never have one

            self._shells = Shells(self.tools)
        return self._shells

    async def close(self) -> None:
        """Remove every container, then unmount every layer."""
        if self._shells is not None:
            await self._shells.close()
        for ident in list(self._known):
            await self.remove(ident)
        self.tools.layers.close()
