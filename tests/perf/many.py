"""A daemon that knows many pods: its memory, and what its lists cost the event loop."""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path
from typing import Any, cast

from grpclib.client import Channel
from grpclib.config import Configuration
from grpclib.encoding.base import CodecBase

from hyperpod.api.gen.runtime import v1 as cri
from tests.daemonkit import Cri, Daemon
from tests.perf.report import Figure, progress

SANDBOXES = 100
CONTAINERS = 1000
LABELS = {f"example.org/label-{n}": f"value-{n}" for n in range(10)}
ANNOTATIONS = {f"example.org/annotation-{n}": "x" * 40 for n in range(5)}


async def make_one(daemon: Daemon, client: Cri) -> None:
    """A stopped pod with a container that has run: the records that `copy` multiplies."""
    pod = await client.run_pod()
    container = await client.run(pod, "/bin/true", labels=LABELS, annotations=ANNOTATIONS)
    await client.wait(container)
    await client.runtime.stop_pod_sandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))


def kept(daemon: Daemon) -> tuple[Path, Path]:
    """Aside: the folders of the one pod's record and the one container's."""
    aside = []
    for kind in ("sandboxes", "containers"):
        [folder] = list((daemon.state / kind).iterdir())
        aside.append(daemon.base / f"original-{kind}")
        shutil.move(folder, aside[-1])
    return aside[0], aside[1]


def copy(daemon: Daemon, originals: tuple[Path, Path], containers_each: int) -> None:
    """While the daemon is stopped: SANDBOXES copies of the pod, each with so many of the container."""
    pod, container = originals
    sandboxes, containers = daemon.state / "sandboxes", daemon.state / "containers"
    for folder in (*sandboxes.iterdir(), *containers.iterdir()):
        shutil.rmtree(folder)
    for number in range(SANDBOXES):
        pod_id = secrets.token_hex(32)

        def other_pod(record: dict[str, Any], ident: str = pod_id, slot: int = number) -> None:
            record["id"], record["slot"], record["domain"] = ident, slot, f"hp-{ident[:12]}"
            record["config"]["metadata"]["uid"] = ident

        _copied(pod, sandboxes / pod_id, other_pod)
        for attempt in range(containers_each):
            ident = secrets.token_hex(32)

            def other(
                record: dict[str, Any], ident: str = ident, pod_id: str = pod_id, attempt: int = attempt
            ) -> None:
                record["id"], record["sandbox_id"] = ident, pod_id
                record["config"]["metadata"]["attempt"] = attempt

            _copied(container, containers / ident, other)


def _copied(source: Path, target: Path, change: Any) -> None:
    shutil.copytree(source, target)
    record = json.loads((target / "record.json").read_text())
    change(record)
    (target / "record.json").write_text(json.dumps(record))


async def memory(daemon: Daemon) -> Figure:
    """RSS of the daemon that has just read the records and has listed everything."""
    async with daemon.client() as client:
        pods = (await client.runtime.list_pod_sandbox(cri.ListPodSandboxRequest())).items
        assert len(pods) == SANDBOXES, f"{len(pods)} pods are known"
        assert (
            len((await client.runtime.list_containers(cri.ListContainersRequest())).containers) == SANDBOXES
        )
    status = Path(f"/proc/{daemon.pid()}/status").read_text()
    rss = int(status.partition("VmRSS:")[2].split()[0]) * 1024
    return Figure(
        f"daemon, RSS with {SANDBOXES} sandboxes", rss / 1e6, "MB", 120.0, note="as many containers"
    )


class _Raw(CodecBase):
    """Leaves replies as they are: decoding a thousand items in this process would tell of the client."""

    __content_subtype__ = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        return bytes(message)

    def decode(self, data: bytes, message_type: Any) -> Any:
        return data


async def lists(daemon: Daemon, rounds: int) -> list[Figure]:
    """CPU of the loop's thread for ListContainers, with HTTP/2 and all, filtered and not."""
    config = Configuration(http2_stream_window_size=8 << 20, http2_connection_window_size=8 << 20)
    channel = Channel(path=str(daemon.socket), codec=_Raw(), config=config)
    runtime = cri.RuntimeServiceStub(channel)
    everything = cri.ListContainersRequest()
    name, value = next(iter(LABELS.items()))
    labelled = cri.ListContainersRequest(filter=cri.ContainerFilter(label_selector={name: value}))
    figures = []
    try:
        first, reply = await _cost(daemon, runtime, everything, 1)
        found = cri.ListContainersResponse.parse(reply).containers
        assert len(found) == CONTAINERS, f"{len(found)} containers are listed"
        for what, request in (("", everything), (", by a label", labelled)):
            cost, again = await _cost(daemon, runtime, request, rounds)
            assert again == reply, "the same containers, other bytes"
            note = (
                f"mean of {rounds}, {len(reply) >> 10} KiB, gRPC included, back to back; first {first:.0f} ms"
            )
            figures.append(
                Figure(f"ListContainers of {CONTAINERS}{what}: CPU of the loop", cost, "ms", 5.0, note=note)
            )
            progress(f"ListContainers{what}: {cost:.2f} ms")
    finally:
        channel.close()
    return figures


async def _cost(
    daemon: Daemon, runtime: cri.RuntimeServiceStub, request: cri.ListContainersRequest, rounds: int
) -> tuple[float, bytes]:
    """Milliseconds per call, and the last reply."""
    before, reply = cpu_ns(daemon.pid()), b""
    for _ in range(rounds):
        reply = cast(bytes, await runtime.list_containers(request))
    return (cpu_ns(daemon.pid()) - before) / rounds / 1e6, reply


def cpu_ns(pid: int) -> int:
    """CPU time of the main thread, which runs the event loop."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0])
