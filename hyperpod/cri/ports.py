"""What the RPC services call."""

from __future__ import annotations

from dataclasses import dataclass

from hyperpod.container.execsync import ExecRunner
from hyperpod.container.manager import ContainerManager
from hyperpod.cri.stats import StatsReader
from hyperpod.image.store import ImageStore
from hyperpod.sandbox.manager import SandboxManager
from hyperpod.sandbox.network import PodNetworks
from hyperpod.sandbox.userns import UserNamespaces
from hyperpod.streaming.streams import Streams


@dataclass(frozen=True)
class Ports:
    """The managers behind the services, made by the composition root."""

    sandboxes: SandboxManager
    containers: ContainerManager
    execs: ExecRunner
    streams: Streams
    images: ImageStore
    networks: PodNetworks
    stats: StatsReader
    userns: UserNamespaces
