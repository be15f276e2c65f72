"""Bytes that a client may send: refused, or understood as Google's protobuf understands them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from betterproto2 import Message
from google.protobuf import (  # type: ignore[import-untyped]  # it has no annotations
    descriptor_pb2,
    descriptor_pool,
    message_factory,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.api.generate import API
from hyperpod.errors import InvalidArgument, ResourceExhausted
from hyperpod.rpc import strict
from hyperpod.rpc.encode import encode

REQUESTS: list[type[Message]] = [
    cri.RunPodSandboxRequest,
    cri.CreateContainerRequest,
    cri.PullImageRequest,
    cri.ExecSyncRequest,
    cri.ListContainersRequest,
]


@cache
def google(name: str) -> Any:
    """Google's class of a CRI message."""
    with tempfile.TemporaryDirectory(prefix="hyperpod-fuzz-") as folder:
        out = Path(folder) / "set"
        command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(API), f"--descriptor_set_out={out}"]
        subprocess.run([*command, str(API / "cri.proto")], check=True, timeout=60)
        files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"runtime.v1.{name}"))


def examine(kind: type[Message], raw: bytes) -> bool:
    """Whether it is taken; then it must mean the same to Google's protobuf before and after our handling."""
    try:
        strict.check(raw, kind)
    except (InvalidArgument, ResourceExhausted):
        return False
    theirs = google(kind.__name__)
    again = encode(kind.parse(raw))
    assert again == bytes(kind.parse(raw))
    assert theirs.FromString(again) == theirs.FromString(raw)
    return True


def _full() -> list[bytes]:
    security = cri.LinuxContainerSecurityContext(
        run_as_user=cri.Int64Value(), supplemental_groups=[0, 5, 2**40], masked_paths=["/a", ""]
    )
    config = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="m", attempt=3),
        image=cri.ImageSpec(image="busybox", annotations={"a": "b", "": ""}),
        command=["sh", "", "-c"],
        envs=[cri.KeyValue(key="K", value=b"\xff"), cri.KeyValue()],
        mounts=[cri.Mount(uid_mappings=[cri.IdMapping(length=2**32 - 1)], readonly=True)],
        tty=True,
        linux=cri.LinuxContainerConfig(security_context=security),
        stop_signal=cri.Signal.SIGINT,
    )
    state = cri.ContainerStateValue(state=cri.ContainerState.CONTAINER_EXITED)
    return [
        bytes(cri.RunPodSandboxRequest(config=cri.PodSandboxConfig(labels={"k": "v"}, hostname="h"))),
        bytes(cri.CreateContainerRequest(pod_sandbox_id="f" * 64, config=config)),
        bytes(cri.PullImageRequest(auth=cri.AuthConfig(username="u"))),
        bytes(cri.ExecSyncRequest(container_id="c", cmd=["a", "b"], timeout=-5)),
        bytes(cri.ListContainersRequest(filter=cri.ContainerFilter(state=state, label_selector={"a": "b"}))),
    ]


@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_whole_requests_are_taken(number: int) -> None:
    assert examine(REQUESTS[number], _full()[number])


@settings(max_examples=400)
@given(st.sampled_from(REQUESTS), st.binary(max_size=200))
def test_any_bytes(kind: type[Message], raw: bytes) -> None:
    examine(kind, raw)


@settings(max_examples=1500)
@given(st.data())
def test_damaged_requests(data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(REQUESTS) - 1))
    raw = bytearray(_full()[number])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        match data.draw(st.integers(0, 2)):
            case 0:
                raw[at : at + 1] = data.draw(st.binary(max_size=2))
            case 1:
                del raw[at : at + data.draw(st.integers(1, 8))]
            case _:
                raw[at:at] = raw[: data.draw(st.integers(0, 40))]
    examine(REQUESTS[number], bytes(raw))


def test_a_message_given_twice() -> None:
    """What the fuzzer found: protobuf merges the two, betterproto2 would forget the first one's labels."""
    config = b"\x12\x01h2\x06\n\x01%c\x12\x01v"
    raw = b"".join(b"\n\x0b" + config % letter for letter in (b"j", b"k"))
    with pytest.raises(InvalidArgument, match="config is given twice"):
        strict.check(raw, cri.RunPodSandboxRequest)
