"""Pure parts of the agent and of its client."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.agent import podfiles
from hyperpod.agent.containers import check_id
from hyperpod.agent.crun import failure
from hyperpod.agent.events import KEPT, EventLog, Status
from hyperpod.agent.layers import serial_in
from hyperpod.agent.layout import Layout
from hyperpod.agent.ocispec import OciSpec, parse_object
from hyperpod.agent.reaper import exit_code
from hyperpod.agent.rootfs import remove_tree
from hyperpod.agentclient.channel import BoundedCodec
from hyperpod.api.gen.hyperpod.agent import v1
from hyperpod.errors import FailedPrecondition, InvalidArgument, NotFound, ProtocolError, Unavailable
from hyperpod.spec.oci import ContainerSpecInput, build_spec


@pytest.mark.parametrize(
    ("page", "serial"),
    [
        (b"\x00\x80\x00\x08scratch ", "scratch"),
        (b"\x00\x80\x00\x03abcdef", "abc"),
        (b"\x00\x83\x00\x03abc", ""),
        (b"\x00\x80", ""),
        (b"", ""),
        (b"\x00\x80\x00\x02\xff\xfe", "��"),
    ],
)
def test_serials(page: bytes, serial: str) -> None:
    assert serial_in(page) == serial


def test_exit_codes() -> None:
    assert exit_code(7 << 8) == 7
    assert exit_code(9) == 137
    assert exit_code(64) == 192


def test_crun_failures_tell_the_reason() -> None:
    missing = b'{"msg":"executable file `x` not found in $PATH: No such file or directory","level":"error"}\n'
    assert isinstance(failure("run", 1, missing), NotFound)
    other = failure(
        "run", 1, b'{"msg":"mount: Permission denied","level":"error"}\nnot json\xff\x1b[0m\n[]\n'
    )
    assert isinstance(other, FailedPrecondition)
    assert str(other) == "mount: Permission denied; not json\\xef\\xbf\\xbd\\x1b[0m; []"
    assert isinstance(failure("run", 139, b""), Unavailable)


@pytest.mark.parametrize("value", ["", "a" * 31, "A" * 32, "../" + "a" * 29, "a" * 31 + "\n", "g" * 32])
def test_ids_that_could_be_paths_are_refused(value: str) -> None:
    with pytest.raises(InvalidArgument):
        check_id("exec", value, 32)


@pytest.mark.parametrize("data", [b"", b"1", b"[]", b'"x"', b"{", b"\xff\xfe\xfa", b'{"a":' * 5000])
def test_only_objects_are_parsed(data: bytes) -> None:
    with pytest.raises(InvalidArgument):
        parse_object("it", data)


async def test_events_are_numbered_and_bounded() -> None:
    log = EventLog()
    for number in range(KEPT + 10):
        log.publish(Status(str(number)))
    assert log.last == KEPT + 10
    with pytest.raises(FailedPrecondition, match="not kept"):
        await anext(log.follow(3))
    follower = log.follow(KEPT + 8)
    assert [(await anext(follower))[0] for _ in range(2)] == [KEPT + 9, KEPT + 10]


def test_a_tree_deeper_than_any_path_is_removed(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    (root / "link").symlink_to("/etc")
    with contextlib.chdir(root):
        for _ in range(3000):
            Path("d").mkdir()
            os.chdir("d")
    remove_tree(str(root))
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.binary(max_size=20), max_size=50))
def test_real_messages_pass(serials: list[bytes]) -> None:
    message = v1.ForgetLayersRequest(serials=[s.hex() + "x" for s in serials])
    assert BoundedCodec().decode(bytes(message), v1.ForgetLayersRequest) == message


@pytest.mark.parametrize(
    "data",
    [
        b"\x08",
        b"\x0a\x05ab",
        b"\x0b",
        b"\xff" * 12,
        b"\x25\x00",
        b"\x08" + b"\x80" * 11,
        b"\x0d" + bytes(4),  # seq as fixed32
        b"\x10\x05",  # a number where the exited container belongs
        b"\x12\x02\x08\x05",  # a number where its id belongs
        b"\x12\x03\x0a\x01\xff",  # an id that is not UTF-8
    ],
)
def test_malformed_messages_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        BoundedCodec().decode(data, v1.Event)


@given(st.binary(max_size=300))
def test_the_codec_raises_nothing_else(data: bytes) -> None:
    for kind in (v1.ListContainersResponse, v1.HelloResponse, v1.Event):
        with contextlib.suppress(ProtocolError):
            assert isinstance(BoundedCodec().decode(data, kind), kind)


def test_a_flood_of_empty_items_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ProtocolError, match="more than"):
        BoundedCodec().decode(b"\x0a\x00" * 32768, v1.ListContainersResponse)


def test_pod_files_are_bound_unless_the_request_mounts_there(tmp_path: Path) -> None:
    layout = Layout(root=str(tmp_path), scratch=str(tmp_path), cgroup="/x", guest=True)
    (tmp_path / "e").mkdir()
    for name in ("hosts", "resolv.conf"):
        (tmp_path / "e" / name).write_text("x")
    spec: dict[str, Any] = {
        "root": {"readonly": True},
        "mounts": [{"destination": "/etc/hosts/", "source": "/kubelet"}],
    }
    podfiles.add_mounts(layout, spec)
    assert [(m["destination"], m["source"]) for m in spec["mounts"]] == [
        ("/etc/hosts/", "/kubelet"),
        ("/etc/resolv.conf", f"{tmp_path}/e/resolv.conf"),
    ]
    assert "ro" in spec["mounts"][1]["options"]


# -- the OCI spec and its filter ---------------------------------------------------------------------------

TEXT = st.one_of(
    st.sampled_from(["seccomp", "linux", ',"seccomp":{', '"seccomp":{"a":{}}}}', ","]), st.text(max_size=20)
)
VALUES = st.recursive(
    st.one_of(st.none(), st.integers(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=8,
)
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=3)


def compact(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def written(spec: OciSpec, folder: Path) -> Any:
    spec.write(str(folder / "config.json"))
    return json.loads((folder / "config.json").read_bytes())


def test_a_filter_goes_through_as_it_is(tmp_path: Path) -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}],
    }
    data = build_spec(ContainerSpecInput(args=("a", ',"seccomp":{', 'b"}}}'), seccomp=profile))
    whole, spec = json.loads(data), OciSpec(data)
    assert "seccomp" not in spec.document["linux"] and whole["linux"]["seccomp"] == profile
    whole["linux"]["devices"] = spec.document["linux"]["devices"] = [{"path": "/dev/x"}]
    assert written(spec, tmp_path) == whole


def test_no_filter_is_lost_wherever_it_is(tmp_path: Path) -> None:
    late = b'{"linux":{"a":1,"seccomp":{"b":{}}},"annotations":{"c":"d"}}'
    assert written(OciSpec(late), tmp_path) == json.loads(late)
    with pytest.raises(InvalidArgument):
        OciSpec(b'{"linux":{"a":1},"other":{"a":1,"seccomp":{"b":{}}}}')
    spec = OciSpec(b'{"linux":{"a":1,"seccomp":{"b":{}}}}')
    spec.document["added"] = {}
    with pytest.raises(InvalidArgument):
        written(spec, tmp_path)


@given(OBJECTS, OBJECTS, OBJECTS)
def test_any_spec_is_refused_or_written_as_it_came(
    tmp_path_factory: pytest.TempPathFactory, before: Any, section: Any, profile: Any
) -> None:
    before.pop("linux", None)
    document = {**before, "linux": {**section, "seccomp": profile}}
    with contextlib.suppress(InvalidArgument):
        assert written(OciSpec(compact(document)), tmp_path_factory.getbasetemp()) == document
