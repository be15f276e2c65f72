"""`hyperpod demo IMAGE`: the whole life of a pod through the CRI socket, told step by step."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.cli.client import Client, connect

SCRIPT = 'echo "hello from $(hostname), kernel $(uname -r)"; echo "to stderr" >&2; '
SCRIPT += 'while :; do echo "hello over the network from $(hostname)" | nc -l -p 8080; done'
PORT = 8080


class Demo:
    """One run; `say` numbers the steps and tells what each took."""

    def __init__(self, client: Client, image: str) -> None:
        self.client, self.image = client, image
        self.logs = tempfile.mkdtemp(prefix="hyperpod-demo-")
        self.timings: dict[str, float] = {}
        self._start = time.monotonic()

    def say(self, name: str, text: str) -> None:
        now = time.monotonic()
        self.timings[name] = now - self._start
        print(f"  {name:<10} {now - self._start:7.3f} s  {text}", flush=True)
        self._start = time.monotonic()

    async def run(self) -> None:
        runtime = self.client.runtime
        version = await runtime.version(cri.VersionRequest())
        self.say(
            "version", f"{version.runtime_name} {version.runtime_version}, CRI {version.runtime_api_version}"
        )
        await self._image()
        pod = cri.PodSandboxConfig(
            metadata=cri.PodSandboxMetadata(name="demo", uid=f"demo-{os.getpid()}", namespace="default"),
            hostname="demo",
            log_directory=self.logs,
            linux=cri.LinuxPodSandboxConfig(),
        )
        made = await runtime.run_pod_sandbox(cri.RunPodSandboxRequest(config=pod))
        sandbox = made.pod_sandbox_id
        self.say("sandbox", f"{sandbox[:12]} is a virtual machine of its own")
        try:
            await self._container(sandbox, pod)
        finally:
            self._start = time.monotonic()
            await runtime.stop_pod_sandbox(cri.StopPodSandboxRequest(pod_sandbox_id=sandbox))
            self.say("stop", "VM destroyed")
            await runtime.remove_pod_sandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=sandbox))
            self.say("remove", "records, scratch disk and sockets gone")
            shutil.rmtree(self.logs, ignore_errors=True)

    async def _image(self) -> None:
        spec = cri.ImageSpec(image=self.image)
        status = await self.client.images.image_status(cri.ImageStatusRequest(image=spec))
        if status.image is None or not status.image.id:
            await self.client.images.pull_image(cri.PullImageRequest(image=spec))
        self.say("image", self.image)

    async def _container(self, sandbox: str, pod: cri.PodSandboxConfig) -> None:
        runtime = self.client.runtime
        config = cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name="main"),
            image=cri.ImageSpec(image=self.image),
            command=["/bin/sh", "-c", SCRIPT],
            log_path="main.log",
        )
        request = cri.CreateContainerRequest(pod_sandbox_id=sandbox, config=config, sandbox_config=pod)
        container = (await runtime.create_container(request)).container_id
        self.say("create", container[:12])
        await runtime.start_container(cri.StartContainerRequest(container_id=container))
        self.say("start", "running")
        lines = await self._lines(2)
        self.say("log", f"{len(lines)} lines:")
        for line in lines:
            print(f"             | {line}")
        guest = await runtime.exec_sync(
            cri.ExecSyncRequest(container_id=container, cmd=["uname", "-r"], timeout=30)
        )
        self.say("exec", "uname -r by ExecSync")
        print(f"             guest kernel {guest.stdout.decode().strip()}   host kernel {os.uname().release}")
        await self._network(sandbox)
        await self._phases(sandbox)

    async def _network(self, sandbox: str) -> None:
        """Ask the pod from here, at its own address."""
        status = await self.client.runtime.pod_sandbox_status(
            cri.PodSandboxStatusRequest(pod_sandbox_id=sandbox)
        )
        assert status.status is not None and status.status.network is not None
        network = status.status.network
        addresses = [network.ip, *(other.ip for other in network.additional_ips)]
        self.say("network", f"the pod's addresses: {', '.join(addresses)}")
        for _ in range(50):
            try:
                async with asyncio.timeout(5):
                    reader, writer = await asyncio.open_connection(network.ip, PORT)
                    answer = await reader.readline()
                    writer.close()
            except OSError:  # the script has not come that far, or the image has no nc
                await asyncio.sleep(0.1)
            else:
                self.say("answer", f"from {network.ip}:{PORT}: {answer.decode(errors='replace').strip()}")
                return
        self.say("answer", f"none from {network.ip}:{PORT}: does the image have no nc?")

    async def _lines(self, count: int) -> list[str]:
        path = Path(self.logs) / "main.log"
        for _ in range(600):
            lines = path.read_text().splitlines() if path.exists() else []
            if len(lines) >= count:
                return lines
            await asyncio.sleep(0.05)
        return lines

    async def _phases(self, sandbox: str) -> None:
        status = await self.client.runtime.pod_sandbox_status(
            cri.PodSandboxStatusRequest(pod_sandbox_id=sandbox, verbose=True)
        )
        phases = {str(k): float(v) for k, v in json.loads(status.info.get("timings", "{}")).items()}
        phases["image"] = self.timings["image"]
        phases["container"] = self.timings["create"] + self.timings["start"]
        print("  phases     " + "  ".join(f"{name} {seconds:.3f} s" for name, seconds in phases.items()))


async def demo(endpoint: str, image: str) -> int:
    async with connect(endpoint) as client:
        await Demo(client, image).run()
    return 0


def main(args: argparse.Namespace) -> int:
    return asyncio.run(demo(args.endpoint, args.image))
