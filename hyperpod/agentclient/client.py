"""The agent API as coroutines. Made for one connection: when it breaks, make another client."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.exceptions import ProtocolError as GrpcProtocolError
from h2.exceptions import H2Error

from hyperpod.agentclient import figures
from hyperpod.agentclient.channel import AgentChannel, BoundedCodec
from hyperpod.agentclient.figures import Bounds, SandboxFigures
from hyperpod.agentclient.types import (
    AgentContainerState,
    ContainerInfo,
    ExitEvent,
    HelloInfo,
    ImageVolume,
    Layer,
    Security,
    UserInfo,
)
from hyperpod.api.gen.hyperpod.agent import v1
from hyperpod.api.gen.hyperpod.agentstats.v1 import Page
from hyperpod.errors import (
    AlreadyExists,
    ConnectionLost,
    DeadlineExceeded,
    FailedPrecondition,
    GuestError,
    HyperpodError,
    InvalidArgument,
    NotFound,
    ProtocolError,
    ResourceExhausted,
    Unavailable,
)
from hyperpod.logs import printable
from hyperpod.model.network import GuestInterface
from hyperpod.model.security import UserNamespace
from hyperpod.rpc.encode import encode
from hyperpod.spec.users import MAX_GROUPS, MAX_ID
from hyperpod.vsock.dial import Endpoint
from hyperpod.vsock.open import CONTROL_PORT, open_agent

API_VERSION = 1
SHORT, LONG = 10.0, 90.0
"""Seconds: for calls that the agent answers at once, and for those that run crun or wait for disks."""

MAX_STATS_PAGES = 16
"""An agent has 256 containers at most, and gives 32 at once."""

TEXT_LIMIT = 1024
MAX_REQUEST = 4 << 20

_ERRORS: Mapping[Status, type[HyperpodError]] = {
    Status.INVALID_ARGUMENT: InvalidArgument,
    Status.NOT_FOUND: NotFound,
    Status.ALREADY_EXISTS: AlreadyExists,
    Status.FAILED_PRECONDITION: FailedPrecondition,
    Status.RESOURCE_EXHAUSTED: ResourceExhausted,
    Status.UNAVAILABLE: Unavailable,
}

T = TypeVar("T")
_HEX = frozenset("0123456789abcdef")


class AgentClient:
    """Every coroutine raises hyperpod errors only: ConnectionLost when the connection is lost, DeadlineExceeded
    at its own deadline, ProtocolError or GuestError for nonsense, else what the agent reports."""

    def __init__(self, endpoint: Endpoint, sandbox_id: str, token: bytes) -> None:
        self.endpoint, self.sandbox_id, self._token = endpoint, sandbox_id, token
        self._channel: AgentChannel | None = None

    async def connect(self, *, claim: bool, timeout: float) -> None:
        """Dial and prove each other. `claim`: this is the first connection of the agent's life."""
        sock, trailing = await open_agent(
            self.endpoint, CONTROL_PORT, self.sandbox_id, self._token, claim=claim, timeout=timeout
        )
        channel = AgentChannel()
        await channel.start(sock, trailing)
        self._channel = channel

    async def close(self) -> None:
        """Close the connection; running calls raise ConnectionLost. Safe to repeat."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    # -- calls --------------------------------------------------------------------------------------------

    async def hello(
        self,
        *,
        host_time_ns: int,
        entropy: bytes,
        hostname: str,
        sysctls: Mapping[str, str],
        interfaces: Sequence[GuestInterface] = (),
        resolv_conf: str = "",
        hosts: str = "",
        userns: UserNamespace | None = None,
    ) -> HelloInfo:
        """First call of a connection; sets the guest's clock, user namespace, hostname, network and sysctls.

        Raises InvalidArgument for a sysctl or an address that the guest's kernel does not take, FailedPrecondition
        when the pod is to have a user namespace and the agent knows of none.
        """
        answer = await self._call(
            lambda stub: stub.hello,
            v1.HelloRequest(
                api_version=API_VERSION,
                host_time_ns=host_time_ns,
                entropy=entropy,
                hostname=hostname,
                sysctls=dict(sysctls),
                interfaces=[_interface(interface) for interface in interfaces],
                resolv_conf=resolv_conf,
                hosts=hosts,
                userns=None if userns is None else _userns(userns),
            ),
            SHORT,
        )
        if userns is not None and not answer.userns:
            raise FailedPrecondition(
                f"the pod's agent ({printable(answer.agent_version, 64)}) makes no user namespaces, for which "
                "hostUsers: false asks: build the guest image anew, or restart the service if it is a host pod"
            )
        return HelloInfo(
            api_version=answer.api_version,
            agent_version=printable(answer.agent_version, 64),
            kernel_release=printable(answer.kernel_release, 128),
            boot_id=printable(answer.boot_id, 64),
            crun_version=printable(answer.crun_version, 64),
            memory_total_bytes=answer.memory_total_bytes,
            cpus=answer.cpus,
            event_seq=answer.event_seq,
        )

    async def create_container(
        self,
        ident: str,
        *,
        oci_spec: bytes,
        layers: Sequence[Layer],
        tty: bool = False,
        stdin: bool = False,
        stdin_once: bool = False,
        scratch: str = "",
        security: Security | None = None,
        share: str = "",
        submounts: Sequence[str] = (),
        image_volumes: Sequence[ImageVolume] = (),
    ) -> UserInfo | None:
        """Mount the root and write the bundle. `layers`: topmost last. `share`: agent.proto.

        Gives the user when `security` is given. Raises NotFound when an image volume has no such folder."""
        request = v1.CreateContainerRequest(
            id=ident,
            oci_spec=oci_spec,
            layers=_layers(layers),
            scratch=scratch,
            tty=tty,
            stdin=stdin,
            stdin_once=stdin_once,
            security=_security(security),
            share=share,
            submounts=list(submounts),
            image_volumes=[
                v1.ImageVolume(destination=x.destination, layers=_layers(x.layers), sub_path=x.sub_path)
                for x in image_volumes
            ],
        )
        if (size := len(encode(request))) > MAX_REQUEST - 64 * 1024:
            raise InvalidArgument(f"the container's specification is {size} bytes, too large")
        user = (await self._call(lambda stub: stub.create_container, request, LONG)).user
        return None if user is None else _user(user)

    async def start_container(self, ident: str) -> int:
        """Gives the pid in the guest. Raises NotFound for a missing program; it is CREATED still then."""
        answer = await self._call(lambda stub: stub.start_container, v1.StartContainerRequest(id=ident), LONG)
        return int(answer.pid)

    async def signal_container(self, ident: str, number: int, *, all_processes: bool = False) -> None:
        """Raises FailedPrecondition when it does not run."""
        request = v1.SignalContainerRequest(id=ident, signal=number, all=all_processes)
        await self._call(lambda stub: stub.signal_container, request, SHORT)

    async def remove_container(self, ident: str) -> None:
        """Kill, unmount, forget; an unknown one is fine."""
        await self._call(lambda stub: stub.remove_container, v1.RemoveContainerRequest(id=ident), LONG)

    async def update_container(self, ident: str, resources_json: bytes) -> None:
        """New limits: OCI linux.resources. Raises FailedPrecondition when it has ended."""
        request = v1.UpdateContainerRequest(id=ident, resources_json=resources_json)
        await self._call(lambda stub: stub.update_container, request, LONG)

    async def stats(self, most: Bounds, *, details: bool = False, timeout: float = SHORT) -> SandboxFigures:
        """Of the guest and all its containers; `timeout` is each page's."""
        after, guest = "", None
        found: dict[str, figures.ContainerFigures] = {}
        for _ in range(MAX_STATS_PAGES):
            request = v1.StatsRequest(after_id=after, details=details)
            reply = await self._call(lambda stub: stub.stats, request, timeout)
            with _mapped("Stats"):
                answer = BoundedCodec().decode(reply.page, Page)
            if guest is None:
                guest = figures.guest(answer.guest, most)
            for stats in answer.containers:
                if stats.id <= after:
                    raise GuestError("the agent's statistics are not in the order of their ids")
                after = _ident(stats.id)
                found[after] = figures.container(stats, most)
            if not (answer.more and answer.containers):
                return SandboxFigures(guest, found)
        raise GuestError("the agent's statistics do not end")

    async def list_containers(self) -> list[ContainerInfo]:
        answer = await self._call(lambda stub: stub.list_containers, v1.ListContainersRequest(), SHORT)
        return [_info(state) for state in answer.containers]

    async def events(self, after_seq: int) -> AsyncIterator[ExitEvent]:
        """Exits after number `after_seq`, until the connection ends: then it ends or raises ConnectionLost."""
        last = after_seq
        with _mapped("Events"):
            async for event in self._stub().events(v1.EventsRequest(after_seq=after_seq)):
                if event.exited is None or event.seq <= last:
                    raise ProtocolError(f"agent: event {event.seq} after {last}")
                last = event.seq
                yield ExitEvent(seq=last, exited=_info(event.exited))

    async def start_exec(
        self, container: str, exec_id: str, *, process_json: bytes, tty: bool = False, stdin: bool = False
    ) -> int:
        """Gives the pid. Raises NotFound for a missing program or container."""
        request = v1.StartExecRequest(
            container_id=container, exec_id=exec_id, process_json=process_json, tty=tty, stdin=stdin
        )
        return int((await self._call(lambda stub: stub.start_exec, request, LONG)).pid)

    async def wait_exec(self, container: str, exec_id: str, *, timeout: float | None = None) -> int:
        """The exit code, 0..255. Raises DeadlineExceeded after `timeout` seconds (None: no limit)."""
        request = v1.WaitExecRequest(container_id=container, exec_id=exec_id)
        return _code((await self._call(lambda stub: stub.wait_exec, request, timeout)).exit_code)

    async def kill_exec(self, container: str, exec_id: str) -> None:
        """SIGKILL everything that the exec started."""
        request = v1.KillExecRequest(container_id=container, exec_id=exec_id)
        await self._call(lambda stub: stub.kill_exec, request, SHORT)

    async def remove_exec(self, container: str, exec_id: str) -> None:
        """Kill what is left and forget it; an unknown one is fine."""
        request = v1.RemoveExecRequest(container_id=container, exec_id=exec_id)
        await self._call(lambda stub: stub.remove_exec, request, SHORT)

    async def resize_tty(self, container: str, exec_id: str, *, rows: int, cols: int) -> None:
        """`exec_id` empty: the container's own terminal."""
        request = v1.ResizeTtyRequest(container_id=container, exec_id=exec_id, rows=rows, cols=cols)
        await self._call(lambda stub: stub.resize_tty, request, SHORT)

    async def set_clock(self, ns: int) -> None:
        await self._call(lambda stub: stub.set_clock, v1.SetClockRequest(ns=ns), SHORT)

    async def forget_layers(self, serials: Sequence[str]) -> None:
        """Unmount layers before their LUNs go. Raises FailedPrecondition when one is in use."""
        await self._call(
            lambda stub: stub.forget_layers, v1.ForgetLayersRequest(serials=list(serials)), SHORT
        )

    async def shutdown(self) -> None:
        """Kill everything and end; a guest powers off."""
        await self._call(lambda stub: stub.shutdown, v1.ShutdownRequest(), LONG)

    # -- plumbing -----------------------------------------------------------------------------------------

    def _stub(self) -> Any:
        if self._channel is None:
            raise ConnectionLost("not connected to the agent")
        return v1.AgentStub(self._channel)

    async def _call(self, method: Callable[[Any], Any], request: Any, timeout: float | None) -> Any:
        with _mapped(type(request).__name__.removesuffix("Request")):
            return await method(self._stub())(request, timeout=timeout)


@contextlib.contextmanager
def _mapped(what: str) -> Iterator[None]:
    """grpclib's exceptions as ours; text of the guest escaped and bounded."""
    try:
        yield
    except GRPCError as exc:
        if exc.status is Status.DEADLINE_EXCEEDED:
            # The agent keeps our deadline too, and may be the first to tell.
            raise DeadlineExceeded(f"the agent did not do {what} in time") from exc
        text = printable(exc.message or exc.status.name, TEXT_LIMIT)
        if (kind := _ERRORS.get(exc.status)) is None:
            # What nobody there foresaw may say no more than that.
            raise GuestError(f"the agent failed at {what}: {text}") from exc
        raise kind(text) from exc
    except TimeoutError as exc:
        raise DeadlineExceeded(f"the agent did not answer {what} in time") from exc
    except (StreamTerminatedError, OSError) as exc:
        raise ConnectionLost(f"the connection to the agent broke during {what}: {exc!s:.200}") from exc
    except (GrpcProtocolError, H2Error, AssertionError, KeyError, ValueError) as exc:
        raise GuestError(f"the agent's answer to {what} is malformed: {printable(repr(exc), 200)}") from exc


def _interface(value: GuestInterface) -> v1.NetworkInterface:
    return v1.NetworkInterface(
        name=value.name,
        mac=value.mac,
        mtu=value.mtu,
        addresses=list(value.addresses),
        routes=[v1.Route(**route.model_dump()) for route in value.routes],
        neighbours=[v1.Neighbour(**neighbour.model_dump()) for neighbour in value.neighbours],
    )


def _userns(value: UserNamespace) -> v1.UserNamespace:
    return v1.UserNamespace(
        uids=v1.IdMapping(host_id=value.uids.host_id, length=value.uids.length),
        gids=v1.IdMapping(host_id=value.gids.host_id, length=value.gids.length),
    )


def _layers(layers: Sequence[Layer]) -> list[v1.Layer]:
    return [v1.Layer(serial=x.serial, path=x.path, fstype=x.fstype) for x in layers]


def _code(value: int) -> int:
    if not 0 <= value <= 255:
        raise GuestError(f"the agent reports exit code {value}")
    return value


def _ident(value: str) -> str:
    if len(value) != 64 or not _HEX.issuperset(value):
        raise GuestError("the agent reports a container without a proper id")
    return value


def _security(security: Security | None) -> v1.Security | None:
    if security is None:
        return None
    return v1.Security(
        user=security.user,
        strict_groups=security.strict_groups,
        pid_target=security.pid_target,
        devices=[
            v1.Device(path=x.path, container_path=x.container_path, permissions=x.permissions)
            for x in security.devices
        ],
        all_devices=security.all_devices,
    )


def _user(user: v1.User) -> UserInfo:
    """Raises GuestError for ids that no kernel has."""
    if len(user.groups) > MAX_GROUPS or max(user.uid, user.gid, *user.groups) > MAX_ID:
        raise GuestError("the agent reports a user that cannot be")
    return UserInfo(user.uid, user.gid, tuple(user.groups))


def _info(state: Any) -> ContainerInfo:
    """Raises GuestError for values that no agent sends."""
    _ident(state.id)
    try:
        known = AgentContainerState(int(state.state))
    except ValueError as exc:
        raise GuestError(f"the agent reports a container in state {int(state.state)}") from exc
    return ContainerInfo(
        id=state.id,
        state=known,
        pid=state.pid,
        exit_code=_code(state.exit_code),
        oom_killed=state.oom_killed,
        started_at_ns=max(state.started_at_ns, 0),
        finished_at_ns=max(state.finished_at_ns, 0),
    )
