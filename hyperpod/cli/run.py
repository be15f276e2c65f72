"""`hyperpod run IMAGE [CMD...]`: one pod, one container, through the CRI socket as the kubelet would."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path

import aiofiles

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.cli.client import Client, connect

POLL = 0.05
"""Seconds between looks at the log and the status."""


async def _image(client: Client, args: argparse.Namespace) -> None:
    spec = cri.ImageSpec(image=args.image)
    if args.pull != "always":
        status = await client.images.image_status(cri.ImageStatusRequest(image=spec))
        if status.image is not None and status.image.id:
            return
    if args.pull != "never":
        await client.images.pull_image(cri.PullImageRequest(image=spec))


def _pod_config(args: argparse.Namespace, logs: str) -> cri.PodSandboxConfig:
    ident = secrets.token_hex(4)
    resources = cri.LinuxContainerResources(memory_limit_in_bytes=args.memory << 20) if args.memory else None
    return cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name=f"run-{ident}", uid=ident, namespace="default"),
        hostname=f"run-{ident}",
        log_directory=logs,
        linux=cri.LinuxPodSandboxConfig(resources=resources),
    )


async def _follow(client: Client, container: str, path: Path) -> int:
    """Copy the CRI log to the terminal until the container has exited and all is read; its exit code."""
    offset = 0
    last: cri.ContainerStatus | None = None
    while True:
        if path.exists():
            async with aiofiles.open(path, "rb") as file:
                await file.seek(offset)
                while (line := await file.readline()).endswith(b"\n"):
                    offset += len(line)
                    _show(line)
        if last is not None:
            break
        reply = await client.runtime.container_status(cri.ContainerStatusRequest(container_id=container))
        assert reply.status is not None
        if reply.status.state == cri.ContainerState.CONTAINER_EXITED:
            last = reply.status
        else:
            await asyncio.sleep(POLL)
    if last.reason not in ("Completed", "Error"):
        print(f"hyperpod: {last.reason}: {last.message}", file=sys.stderr)
    return last.exit_code


def _show(line: bytes) -> None:
    """One CRI log record: time, stream, F or P, text."""
    _, stream, tag, text = line.split(b" ", 3)
    out = sys.stderr if stream == b"stderr" else sys.stdout
    out.buffer.write(text if tag == b"F" else text[:-1])
    out.flush()


async def run(args: argparse.Namespace) -> int:
    logs = tempfile.mkdtemp(prefix="hyperpod-run-")
    timings: dict[str, float] = {}

    async with connect(args.endpoint) as client:
        start = time.monotonic()
        await _image(client, args)
        timings["image"] = time.monotonic() - start
        pod = _pod_config(args, logs)
        sandbox = ""
        try:
            start = time.monotonic()
            made = await client.runtime.run_pod_sandbox(
                cri.RunPodSandboxRequest(config=pod, runtime_handler=args.handler)
            )
            sandbox = made.pod_sandbox_id
            timings["sandbox"] = time.monotonic() - start
            timings.update(await _boot_timings(client, sandbox))
            start = time.monotonic()
            container = cri.ContainerConfig(
                metadata=cri.ContainerMetadata(name="main"),
                image=cri.ImageSpec(image=args.image),
                command=args.argv,
                envs=[_env(item) for item in args.env],
                log_path="main.log",
            )
            request = cri.CreateContainerRequest(pod_sandbox_id=sandbox, config=container, sandbox_config=pod)
            ident = (await client.runtime.create_container(request)).container_id
            await client.runtime.start_container(cri.StartContainerRequest(container_id=ident))
            timings["container"] = time.monotonic() - start
            return await _follow(client, ident, Path(logs) / "main.log")
        finally:
            if sandbox:
                await client.runtime.stop_pod_sandbox(cri.StopPodSandboxRequest(pod_sandbox_id=sandbox))
                await client.runtime.remove_pod_sandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=sandbox))
            shutil.rmtree(logs, ignore_errors=True)
            if args.timings:
                print(" ".join(f"{k}={v:.3f}s" for k, v in timings.items()), file=sys.stderr)


def _env(item: str) -> cri.KeyValue:
    key, _, value = item.partition("=")
    return cri.KeyValue(key=key, value=os.fsencode(value))


async def _boot_timings(client: Client, sandbox: str) -> dict[str, float]:
    reply = await client.runtime.pod_sandbox_status(
        cri.PodSandboxStatusRequest(pod_sandbox_id=sandbox, verbose=True)
    )
    return {str(k): float(v) for k, v in json.loads(reply.info.get("timings", "{}")).items()}


def main(args: argparse.Namespace) -> int:
    return asyncio.run(run(args))
