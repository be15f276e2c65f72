"""Images as volumes: what is refused before anything is touched, what crun is told, and what is told back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.container import process
from hyperpod.cri import convert, refusal, replies
from hyperpod.errors import InvalidArgument
from hyperpod.model.container import Container, ContainerRecord, ContainerStatus
from hyperpod.model.images import ImageConfig
from hyperpod.model.mounts import ImageVolume
from hyperpod.spec.mounts import host_binds
from hyperpod.spec.oci import build_spec

ID = "0123456789abcdef" * 4
IMAGE = "sha256:" + "ab" * 32
SPEC = cri.ImageSpec(image="tools:1", user_specified_image="tools", annotations={"a": "b"})


def volume(path: str = "/v", **more: Any) -> cri.Mount:
    return cri.Mount(**{"container_path": path, "readonly": True, "image": SPEC, **more})


def request(*mounts: cri.Mount) -> cri.CreateContainerRequest:
    """As it comes over the wire."""
    config = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="x"),
        image=cri.ImageSpec(image="x"),
        command=["x"],
        mounts=list(mounts),
    )
    sent = cri.CreateContainerRequest(pod_sandbox_id="p", config=config)
    return cri.CreateContainerRequest.parse(bytes(sent))


def record(*mounts: cri.Mount, volumes: tuple[ImageVolume, ...] = ()) -> ContainerRecord:
    asked = request(*mounts)
    refusal.refuse(asked)
    return ContainerRecord(
        id=ID,
        sandbox_id=ID,
        config=convert.container_config(asked.config),
        image_id="sha256:own",
        image_ref="sha256:own",
        created_at=1,
        log_path="",
        layers=("sha256:l1", "sha256:l2"),
        stop_signal="SIGTERM",
        image_config=ImageConfig(),
        image_volumes=volumes,
    )


@pytest.mark.parametrize(
    ("mount", "words"),
    [
        (volume(readonly=False), r"mounts\[0\]\.readonly is false"),
        (volume(host_path="/h"), r"mounts\[0\]: host_path and image are both set"),
        (volume(image=cri.ImageSpec(user_specified_image="u")), r"mounts\[0\]\.image\.image is missing"),
        (volume(image=None), r"mounts\[0\]\.host_path is missing"),
        (volume(image=None, host_path="/h", image_sub_path="x"), "image_sub_path is set without an image"),
        (volume(image_sub_path="/etc"), "image_sub_path '/etc' is not a path below"),
        (volume(image_sub_path="a/../../etc"), "not a path below the image's root"),
        (volume(image_sub_path="a\0b"), "image_sub_path holds a NUL"),
        (volume(path=""), r"container_path is missing"),
        (volume(path="v"), "container_path 'v' is not absolute"),
        (volume(path="/v/.."), "container's root"),
        (
            volume(propagation=cri.MountPropagation.PROPAGATION_HOST_TO_CONTAINER),
            r"mounts\[0\]\.propagation is HOST_TO_CONTAINER: nothing is ever mounted below an image",
        ),
        (volume(propagation=cri.MountPropagation.PROPAGATION_BIDIRECTIONAL), "propagation is BIDIRECTIONAL"),
        (volume(image=replace(SPEC, runtime_handler="other")), r"image\.runtime_handler is 'other'"),
    ],
)
def test_what_cannot_be_is_named(mount: cri.Mount, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        record(mount)


def test_two_at_one_place_and_half_a_mapping() -> None:
    with pytest.raises(InvalidArgument, match=r"mounts\[1\]\.container_path '/v' is that of mounts\[0\]"):
        record(volume(), cri.Mount(container_path="/v/", host_path="/h"))
    mapping = [cri.IdMapping(length=1)]
    with pytest.raises(InvalidArgument, match=r"mounts\[0\]\.gid_mappings has 0 mappings"):
        record(volume(uid_mappings=mapping))


@pytest.mark.parametrize("path", ["", ".", "etc", "a/b/", "..a/b..", "with space/näme"])
def test_paths_below_the_root_pass(path: str) -> None:
    more: dict[str, Any] = {"image_sub_path": path, "recursive_read_only": True, "selinux_relabel": True}
    assert record(volume(**more)).config.mounts[0].image_sub_path == path


def test_what_crun_and_the_share_are_told() -> None:
    made = record(
        volume("/a//v/"),
        cri.Mount(container_path="/a", host_path="/h"),
        volume("/dev/shm"),
        cri.Mount(container_path="/z", host_path="/h"),
    )
    # A mount keeps its number, whatever the others are.
    binds = host_binds(made.config.mounts, ID)
    assert [(one.destination, one.place[-2:]) for one in binds] == [("/a", "/1"), ("/z", "/3")]
    found = json.loads(build_spec(process.spec_input(made)))["mounts"]
    assert [m["destination"] for m in found][-4:] == ["/a", "/z", "/a/v", "/dev/shm"]
    assert [m["destination"] for m in found].count("/dev/shm") == 1
    assert found[-2] == {
        "destination": "/a/v",
        "type": "bind",
        "source": "",
        "options": ["rbind", "rprivate", "ro", "nosuid", "nodev"],
    }


def test_what_is_told_back() -> None:
    plain = cri.Mount(container_path="/a", host_path="/h")
    asked = volume("/v/", image_sub_path="lib")
    image = ImageVolume(mount=1, image_id=IMAGE, layers=("sha256:l2", "sha256:l3"))
    made = record(plain, asked, volumes=(image,))
    again = ContainerRecord.model_validate_json(made.model_dump_json())
    assert again == made
    reply = replies.container_status(Container(record=again, status=ContainerStatus()), verbose=True)
    assert reply.status is not None
    assert reply.status.mounts == [plain, replace(asked, image=replace(SPEC, image_ref=IMAGE))]
    assert json.loads(reply.info["mounts"])["/v"] == (
        f"read-only layers of 'lib' in image {IMAGE}: read-only, private"
    )
    assert made.image_ids == ["sha256:own", IMAGE]
    assert made.all_layers == ("sha256:l1", "sha256:l2", "sha256:l2", "sha256:l3")
