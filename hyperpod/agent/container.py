"""One container: its state machine, its execs, and the order in which its things are made and unmade.

CREATED --start--> RUNNING --exit of its first process, output read--> EXITED
CREATED --start fails--> CREATED;   any state --remove--> gone
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hyperpod.agent import envexec, podfiles, rootfs, security
from hyperpod.agent.events import State, Status
from hyperpod.agent.layers import LayerSource
from hyperpod.agent.ocispec import OciSpec, write_json
from hyperpod.agent.process import ProcessIO
from hyperpod.agent.resources import adapt, lifts_quota
from hyperpod.agent.security import Security
from hyperpod.agent.tools import Tools
from hyperpod.errors import (
    AlreadyExists,
    FailedPrecondition,
    HyperpodError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from hyperpod.tasks import bounded

if TYPE_CHECKING:
    from hyperpod.agent.execs import Exec
    from hyperpod.agent.imagemount import ImageVolume

log = logging.getLogger(__name__)

MAX_EXECS = 256
STARTS = 4
"""Execs of one container that are being started at once: with hundreds the agent, which waits for each crun to
begin, would have no CPU left for anybody's streams."""

REMOVE_TIMEOUT = 5.0
"""Seconds for the end of a killed container to be noticed."""


class Container:
    """Made by `create`; `status` is what the host sees."""

    def __init__(
        self,
        ident: str,
        tools: Tools,
        on_exit: Callable[[Status], None],
        *,
        tty: bool,
        stdin: bool,
        stdin_once: bool,
    ) -> None:
        self.id, self.tools, self._on_exit = ident, tools, on_exit
        self.status = Status(ident)
        # A terminal has no end of input that its process could see, and takes the next attach's: as containerd.
        once = stdin_once and not tty
        self.io = ProcessIO(tty=tty, stdin=stdin, ends_with_peer=once, eof_closes=once)
        self.execs: dict[str, Exec] = {}
        self.starts = asyncio.Semaphore(STARTS)
        self.cgroup = tools.cgroups.container_path(ident)
        self.lost_oom_kills = 0
        """Of execs that were removed."""
        self.user: dict[str, Any] = {}
        """OCI user object, for execs as well."""
        self.environment: tuple[str, ...] = ()
        """Variables that it has unless others are given, for execs as well."""
        self.pid_target: Container | None = None
        self.namespaces: list[dict[str, Any]] = []
        """Of its OCI spec."""
        self._spec: OciSpec | None = None
        """Until it is started."""
        self._cwd = "/"
        self._variables: envexec.Variables | None = None
        self._exited: asyncio.Future[int] | None = None
        """Of its first process, once started; done as soon as that is reaped."""
        self._left: list[Exec] = []
        """Execs that are over but for what they left in the background; their cgroups go when that has ended."""
        self._serials: list[str] = []
        self._has_volumes = False
        self._lock = asyncio.Lock()
        self._over = asyncio.Event()
        self._removed = False

    @property
    def oom_kills(self) -> int:
        """Of all that ran in it so far, execs included."""
        return self.lost_oom_kills + self.tools.cgroups.oom_kills(self.id)

    async def prepare(
        self,
        given: OciSpec,
        layers: list[LayerSource],
        wanted: Security | None,
        volumes: Sequence[ImageVolume] = (),
    ) -> None:
        """Mount root and image volumes and complete the OCI spec. Nothing is left when it fails."""
        layout, spec = self.tools.layout, given.document
        if not layers:
            raise InvalidArgument(f"container {self.id[:12]} has no layers")
        every = [*layers, *(layer for volume in volumes for layer in volume.layers)]
        numbers = await self.tools.layers.acquire(every)
        self._serials = [layer.serial for layer in every]
        try:
            self.tools.quota.watch(self.id)
            spec["root"]["path"] = rootfs.mount_overlay(
                layout, self.id, numbers[: len(layers)], self.tools.user
            )
            if volumes:
                await self._mount_volumes(spec, volumes, numbers[len(layers) :])
            if writable := spec["root"].pop("writable", ()):
                await self._mount_writable(spec, writable)
            spec["linux"]["cgroupsPath"] = self.cgroup
            spec["linux"]["resources"] = adapt(self.tools.cgroups, spec["linux"]["resources"])
            spec["process"]["terminal"] = self.io.tty
            if wanted is not None:
                self.environment = await security.apply(
                    spec, wanted, bind_devices=self.tools.user is not None
                )
                security.complete(spec["process"], self.environment)
            self.user = spec["process"]["user"]
            if self.tools.user is not None:
                self.tools.user.complete(spec)
            if self.tools.host is not None:
                self.tools.host.complete(spec)
            podfiles.add_mounts(layout, spec)
            self._variables = envexec.take(spec["process"])
            self.namespaces, self._cwd = spec["linux"]["namespaces"], str(spec["process"]["cwd"])
            self._spec = given
        except (HyperpodError, OSError, KeyError, TypeError) as exc:
            await self._undo()
            if isinstance(exc, HyperpodError):
                raise
            raise InvalidArgument(f"container {self.id[:12]}: {exc!r}") from exc

    async def _mount_volumes(
        self, spec: dict[str, Any], volumes: Sequence[ImageVolume], numbers: list[int]
    ) -> None:
        from hyperpod.agent import imagemount  # few containers need it

        self._has_volumes = True
        # Off the event loop: a walk through a hostile image's folders may take a while.
        await asyncio.to_thread(
            imagemount.mount, self.tools.layout, self.id, spec["mounts"], volumes, numbers
        )

    async def _mount_writable(self, spec: dict[str, Any], paths: list[str]) -> None:
        from hyperpod.agent import imagemount

        self._has_volumes = True
        await asyncio.to_thread(
            imagemount.mount_writable, self.tools.layout, self.id, spec, paths, self.tools.user
        )

    async def start(self) -> int:
        """Gives the pid, also of one that was started before: the answer to that was lost. A failure leaves it
        CREATED. Raises NotFound, FailedPrecondition."""
        async with self._lock:
            if self.status.started_at_ns and not self._removed:
                return self.status.pid
            if self.status.state is not State.CREATED or self._removed:
                raise FailedPrecondition(f"container {self.id[:12]} is {self.status.state.name}, not CREATED")
            tools, spec = self.tools, self._spec
            assert spec is not None
            if self.pid_target is not None:
                self._join(spec.document, self.pid_target)
            try:
                spec.write(f"{tools.layout.bundle(self.id)}/config.json")
                pid, exited = await tools.launch(
                    self.io,
                    self._variables,
                    self.user,
                    self._run,
                )
            except (HyperpodError, OSError):
                await self._clear_cgroup()
                tools.crun.forget(self.id)
                raise
            self._exited, self._spec = exited, None
            self.status = replace(self.status, state=State.RUNNING, pid=pid, started_at_ns=time.time_ns())
            tools.owner.spawn(f"exit/{self.id[:12]}", self._wait(exited))
            return pid

    async def _run(self, child: list[int], console: str | None) -> int:
        from hyperpod.agent import workdir  # not needed before the first container

        crun = self.tools.crun
        if not workdir.needs_care(self.namespaces, self._cwd):
            return await crun.run(self.id, child, console)
        pid = await crun.create(self.id, child, console)
        workdir.check(pid)
        await crun.start(self.id)
        return pid

    async def update(self, resources: dict[str, Any]) -> None:
        """New linux.resources, without devices. Raises FailedPrecondition, InvalidArgument."""
        async with self._lock:
            try:
                fitted = adapt(self.tools.cgroups, resources)
            except (KeyError, TypeError) as exc:
                raise InvalidArgument(f"container {self.id[:12]}: {exc!r}") from exc
            if self._removed or self.status.state is State.EXITED:
                raise FailedPrecondition(f"container {self.id[:12]} has ended")
            if self.status.state is State.RUNNING:
                path = f"{self.tools.layout.bundle(self.id)}/resources.json"
                write_json(path, fitted)
                try:
                    await self.tools.crun.update(self.id, path)
                finally:
                    os.unlink(path)
                if lifts_quota(self.tools.cgroups, resources):
                    self.tools.cgroups.lift_quota(self.cgroup)
                return
            assert self._spec is not None
            section = self._spec.document["linux"]
            section["resources"] = {"devices": section["resources"].get("devices", []), **fitted}

    def _join(self, spec: dict[str, Any], target: Container) -> None:
        """Put the target's pid namespace into the spec. Raises FailedPrecondition when it does not run."""
        try:
            pid = target.first_process()
        except FailedPrecondition as exc:
            raise FailedPrecondition(f"its processes are to be seen by {self.id[:12]}, but {exc}") from exc
        namespaces = [item for item in spec["linux"]["namespaces"] if item["type"] != "pid"]
        namespaces.append({"type": "pid", "path": f"/proc/{pid}/ns/pid"})
        spec["linux"]["namespaces"] = namespaces

    async def _wait(self, exited: asyncio.Future[int]) -> None:
        """From the end of the first process to the report of it."""
        code = await exited
        finished, oom = time.time_ns(), self.oom_kills > 0
        # In its own pid namespace everybody is dead already; with a shared one, now they are too.
        await self._kill_leftovers()
        self.io.process_ended()
        await self.io.wait_for_output()
        self.status = replace(
            self.status, state=State.EXITED, exit_code=code, oom_killed=oom, finished_at_ns=finished
        )
        self._over.set()
        self._on_exit(self.status)

    async def _kill_leftovers(self) -> None:
        try:
            await self.tools.cgroups.kill(self.cgroup)
        except HyperpodError as exc:
            log.warning("container %s: %s", self.id[:12], exc)

    async def _clear_cgroup(self) -> None:
        await self._kill_leftovers()
        self.tools.cgroups.remove(self.cgroup)

    def signal(self, number: int, everybody: bool) -> None:
        """Raises FailedPrecondition when it does not run, InvalidArgument for no such signal."""
        if not 1 <= number <= 64:
            raise InvalidArgument(f"there is no signal {number}")
        if everybody and self.status.state is State.RUNNING:
            self.tools.cgroups.signal_all(self.cgroup, number)
            return
        os.kill(self.first_process(), number)

    def first_process(self) -> int:
        """Its pid, which is good until the event loop goes on: once reaped, it may be any process's of this kernel.

        Raises FailedPrecondition when it does not run, though the end may not be reported yet."""
        if self.status.state is not State.RUNNING:
            raise FailedPrecondition(f"container {self.id[:12]} is {self.status.state.name}, not RUNNING")
        if self._exited is None or self._exited.done():
            raise FailedPrecondition(f"container {self.id[:12]} has just ended")
        return self.status.pid

    async def start_exec(self, ident: str, process: dict[str, Any], *, tty: bool, stdin: bool) -> int:
        """Gives the pid. Raises NotFound (no such program), FailedPrecondition, AlreadyExists."""
        self.check_running()
        if ident in self.execs:
            raise AlreadyExists(f"exec {ident} exists")
        if len(self.execs) >= MAX_EXECS:
            raise ResourceExhausted(f"container {self.id[:12]} has {MAX_EXECS} execs already")
        from hyperpod.agent.execs import Exec  # a guest's start does without

        made = self.execs[ident] = Exec(ident, self, tty=tty, stdin=stdin)
        try:
            return await made.start(self.tools, process)
        except (HyperpodError, OSError):
            del self.execs[ident]
            made.io.close()
            raise

    def check_running(self) -> None:
        """Raises FailedPrecondition."""
        self.first_process()
        if self._removed:
            raise FailedPrecondition(f"container {self.id[:12]} is being removed")

    async def ended(self) -> int:
        """Wait for its end, also before its start; gives the exit code."""
        await self._over.wait()
        return self.status.exit_code

    def exec(self, ident: str) -> Exec:
        """A started exec. Raises NotFound."""
        found = self.execs.get(ident)
        if found is None or found.exited is None:
            raise NotFound(f"container {self.id[:12]} has no exec {ident[:32]}")
        return found

    async def remove_exec(self, ident: str, *, kill: bool) -> None:
        """One that runs is killed. `kill`: also what an ended one has left in the background, which goes on
        otherwise. An unknown one is fine."""
        found = self.execs.get(ident)
        if found is None or found.exited is None:
            return
        del self.execs[ident]
        if kill or not found.exited.done():
            await found.remove(self.tools)
        else:
            self._left = [old for old in (*self._left, found) if not old.leave(self.tools)]

    async def remove(self) -> None:
        """Kill, unmount, forget. Raises Unavailable when its processes survive."""
        self._removed = True
        async with self._lock:
            await self.tools.cgroups.kill(self.cgroup)
            if self.status.state is State.RUNNING:
                self.io.close()
                await bounded(self._over.wait(), REMOVE_TIMEOUT, f"the end of container {self.id[:12]}")
            for ident in list(self.execs):
                await self.remove_exec(ident, kill=True)
            self.tools.crun.forget(self.id)
            self.tools.cgroups.remove(self.cgroup)
            self.io.close()
            await self._undo()

    async def _undo(self) -> None:
        """Undo `prepare`."""
        layout = self.tools.layout
        rootfs.unmount_overlay(layout, self.id)
        if self._has_volumes:
            from hyperpod.agent import imagemount

            imagemount.unmount(layout, self.id)
        await self.tools.share.drop(self.id)
        rootfs.remove_tree(layout.bundle(self.id))
        await rootfs.discard(layout, layout.writable(self.id))
        self.tools.quota.forget(self.id)
        self.tools.layers.release(self._serials)
        self._serials = []
