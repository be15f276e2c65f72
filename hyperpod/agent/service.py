"""The control port's gRPC service: messages in and out, errors to status codes, nothing else."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from grpclib.config import Configuration
from grpclib.const import Handler as MethodHandler
from grpclib.const import Status as Code
from grpclib.encoding.proto import ProtoCodec
from grpclib.events import _DispatchServerEvents
from grpclib.exceptions import GRPCError
from grpclib.protocol import H2Protocol
from grpclib.server import Handler
from h2.config import H2Configuration
from h2.settings import SettingCodes

from hyperpod import __version__
from hyperpod.agent.containers import Containers
from hyperpod.agent.environment import Place
from hyperpod.agent.events import Status
from hyperpod.agent.layers import LayerSource
from hyperpod.agent.security import Security
from hyperpod.api.gen.hyperpod.agent import v1
from hyperpod.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    HyperpodError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)

if TYPE_CHECKING:
    from hyperpod.agent.imagemount import ImageVolume

log = logging.getLogger(__name__)

API_VERSION = 1
OLDEST_API_VERSION = 1
"""A daemon one version older or newer is answered; what it does not know it does not send."""

MAX_STREAMS = 2048

_CODES: tuple[tuple[type[HyperpodError], Code], ...] = (
    (InvalidArgument, Code.INVALID_ARGUMENT),
    (NotFound, Code.NOT_FOUND),
    (AlreadyExists, Code.ALREADY_EXISTS),
    (FailedPrecondition, Code.FAILED_PRECONDITION),
    (ResourceExhausted, Code.RESOURCE_EXHAUSTED),
    (DeadlineExceeded, Code.ABORTED),  # a deadline of ours; DEADLINE_EXCEEDED is the caller's own
    (Unavailable, Code.UNAVAILABLE),
)


class AgentService(v1.AgentBase):
    """Translates between the messages of agent.proto and Containers."""

    def __init__(self, containers: Containers, place: Place) -> None:
        self._containers, self._place = containers, place

    async def hello(self, message: v1.HelloRequest) -> v1.HelloResponse:
        if message.api_version < OLDEST_API_VERSION or message.api_version > API_VERSION + 1:
            raise FailedPrecondition(f"API version {message.api_version} is not spoken, {API_VERSION} is")
        await self._place.greet(message)
        self._containers.tools.use(self._place.user)
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot_id = file.read().strip()
        return v1.HelloResponse(
            api_version=API_VERSION,
            agent_version=__version__,
            kernel_release=os.uname().release,
            boot_id=boot_id,
            crun_version=await self._place.crun_version(self._containers.tools.crun),
            memory_total_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            cpus=os.cpu_count() or 1,
            event_seq=self._containers.events.last,
            userns=self._place.user is not None,
        )

    async def create_container(self, message: v1.CreateContainerRequest) -> v1.CreateContainerResponse:
        made = await self._containers.create(
            message.id,
            message.oci_spec,
            _layers(message.layers),
            _security(message.security),
            tty=message.tty,
            stdin=message.stdin,
            stdin_once=message.stdin_once,
            share=message.share,
            submounts=message.submounts,
            image_volumes=_image_volumes(message.image_volumes),
        )
        if message.security is None:
            return v1.CreateContainerResponse()
        user = v1.User(uid=made.user["uid"], gid=made.user["gid"], groups=made.user["additionalGids"])
        return v1.CreateContainerResponse(user=user)

    async def start_container(self, message: v1.StartContainerRequest) -> v1.StartContainerResponse:
        return v1.StartContainerResponse(pid=await self._containers.start(message.id))

    async def signal_container(self, message: v1.SignalContainerRequest) -> v1.SignalContainerResponse:
        self._containers.get(message.id).signal(message.signal, message.all)
        return v1.SignalContainerResponse()

    async def remove_container(self, message: v1.RemoveContainerRequest) -> v1.RemoveContainerResponse:
        await self._containers.remove(message.id)
        return v1.RemoveContainerResponse()

    async def update_container(self, message: v1.UpdateContainerRequest) -> v1.UpdateContainerResponse:
        await self._containers.update(message.id, message.resources_json)
        return v1.UpdateContainerResponse()

    async def stats(self, message: v1.StatsRequest) -> v1.StatsResponse:
        from hyperpod.agent.stats import Stats  # not at the start: 60 ms of an emulated guest's

        page = await Stats(self._containers).page(message.after_id, message.details)
        return v1.StatsResponse(page=bytes(page))

    async def list_containers(self, message: v1.ListContainersRequest) -> v1.ListContainersResponse:
        return v1.ListContainersResponse(containers=[_state(s) for s in self._containers.statuses()])

    async def events(self, message: v1.EventsRequest) -> AsyncIterator[v1.Event]:
        async for seq, status in self._containers.events.follow(message.after_seq):
            yield v1.Event(seq=seq, exited=_state(status))

    async def start_exec(self, message: v1.StartExecRequest) -> v1.StartExecResponse:
        pid = await self._containers.start_exec(
            message.container_id,
            message.exec_id,
            message.process_json,
            tty=message.tty,
            stdin=message.stdin,
            again=True,
        )
        return v1.StartExecResponse(pid=pid)

    async def wait_exec(self, message: v1.WaitExecRequest) -> v1.WaitExecResponse:
        found = self._containers.get(message.container_id).exec(message.exec_id)
        return v1.WaitExecResponse(exit_code=await found.wait())

    async def kill_exec(self, message: v1.KillExecRequest) -> v1.KillExecResponse:
        found = self._containers.get(message.container_id).exec(message.exec_id)
        await self._containers.tools.cgroups.kill(found.cgroup)
        return v1.KillExecResponse()

    async def remove_exec(self, message: v1.RemoveExecRequest) -> v1.RemoveExecResponse:
        await self._containers.remove_exec(message.container_id, message.exec_id, kill=False)
        return v1.RemoveExecResponse()

    async def resize_tty(self, message: v1.ResizeTtyRequest) -> v1.ResizeTtyResponse:
        container = self._containers.get(message.container_id)
        if not (0 < message.rows < 65536 and 0 < message.cols < 65536):
            raise InvalidArgument(f"a terminal cannot have {message.rows} rows and {message.cols} columns")
        io = container.exec(message.exec_id).io if message.exec_id else container.io
        io.resize(message.rows, message.cols)
        return v1.ResizeTtyResponse()

    async def set_clock(self, message: v1.SetClockRequest) -> v1.SetClockResponse:
        self._place.set_clock(message.ns)
        return v1.SetClockResponse()

    async def forget_layers(self, message: v1.ForgetLayersRequest) -> v1.ForgetLayersResponse:
        await self._containers.tools.layers.forget(list(message.serials))
        return v1.ForgetLayersResponse()

    async def shutdown(self, message: v1.ShutdownRequest) -> v1.ShutdownResponse:
        await self._containers.close()
        # After the answer: a moment for it to leave.
        asyncio.get_running_loop().call_later(0.05, self._place.end)
        return v1.ShutdownResponse()


def _layers(layers: list[v1.Layer]) -> list[LayerSource]:
    return [LayerSource(layer.serial, layer.path, layer.fstype) for layer in layers]


def _image_volumes(volumes: list[v1.ImageVolume]) -> list[ImageVolume]:
    if not volumes:
        return []
    from hyperpod.agent.imagemount import ImageVolume  # few containers need it

    return [ImageVolume(x.destination, _layers(x.layers), x.sub_path) for x in volumes]


def _security(message: v1.Security | None) -> Security | None:
    if message is None:
        return None
    return Security(
        user=message.user,
        strict_groups=message.strict_groups,
        pid_target=message.pid_target,
        devices=tuple((x.path, x.container_path, x.permissions) for x in message.devices),
        all_devices=message.all_devices,
    )


def _state(status: Status) -> v1.ContainerState:
    return v1.ContainerState(
        id=status.id,
        state=v1.ContainerStatus(int(status.state)),
        pid=status.pid,
        exit_code=status.exit_code,
        oom_killed=status.oom_killed,
        started_at_ns=status.started_at_ns,
        finished_at_ns=status.finished_at_ns,
    )


def _guarded(route: str, function: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    """An RPC's handler with our errors turned into its status."""

    async def handle(stream: Any) -> None:
        try:
            await function(stream)
        except HyperpodError as exc:
            log.info("%s: %s: %s", route, type(exc).__name__, exc)
            code = next((code for kind, code in _CODES if isinstance(exc, kind)), Code.INTERNAL)
            raise GRPCError(code, str(exc)) from exc
        except OSError as exc:
            log.exception("%s failed", route)
            raise GRPCError(Code.INTERNAL, f"{type(exc).__name__}: {exc}") from exc

    return handle


class _Protocol(H2Protocol):
    """HTTP/2 with room for many long polls: every running exec holds a stream."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.connection._connection.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS})
        self.connection.flush()


def h2_factory(service: AgentService) -> Callable[[], H2Protocol]:
    """Makes the HTTP/2 protocol object for a proven connection."""
    mapping = {
        route: MethodHandler(_guarded(route, h.func), h.cardinality, h.request_type, h.reply_type)
        for route, h in service.__mapping__().items()
    }
    config = Configuration().__for_server__()
    h2_config = H2Configuration(
        client_side=False,
        header_encoding="ascii",
        validate_inbound_headers=False,
        validate_outbound_headers=False,
        normalize_inbound_headers=False,
        normalize_outbound_headers=False,
    )
    dispatch, codec = _DispatchServerEvents(), ProtoCodec()
    return lambda: _Protocol(Handler(mapping, codec, None, dispatch), config, h2_config)
