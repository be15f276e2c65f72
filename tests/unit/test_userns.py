"""User namespaces without a kernel: what a request may say, what becomes of it in an OCI spec."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.agent.pidholder import PidNamespace
from hyperpod.agent.userns import IdMap, PodUser
from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.cri import convert, replies
from hyperpod.errors import InvalidArgument
from hyperpod.model.mounts import Mount
from hyperpod.model.security import IdMapping, NamespaceMode, NamespaceOptions, UserNamespace
from hyperpod.spec import mounts, userns

POD, NODE = cri.NamespaceMode.POD, cri.NamespaceMode.NODE
IDS = UserNamespace(uids=IdMapping(host_id=1000, length=10), gids=IdMapping(host_id=2000, length=20))
WITH = NamespaceOptions(userns_mode=NamespaceMode.POD, userns=IDS)
NODES = NamespaceOptions(userns_mode=NamespaceMode.NODE)


def mapping(host: int = 1000, length: int = 10, container: int = 0) -> cri.IdMapping:
    return cri.IdMapping(host_id=host, length=length, container_id=container)


def options(value: cri.UserNamespace | None) -> NamespaceOptions:
    security = cri.LinuxSandboxSecurityContext(namespace_options=cri.NamespaceOption(userns_options=value))
    config = cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name="p", uid="u", namespace="n"),
        linux=cri.LinuxPodSandboxConfig(security_context=security),
    )
    return convert.sandbox_config(config).namespaces


def test_what_was_asked_for_is_told_again() -> None:
    asked = cri.UserNamespace(mode=POD, uids=[mapping()], gids=[mapping(2000, 20)])
    for value in (asked, cri.UserNamespace(mode=NODE), None):
        assert replies._namespaces(options(value)).userns_options == value
    assert options(asked) == WITH
    assert options(cri.UserNamespace(mode=NODE)).userns is None


@pytest.mark.parametrize(
    ("uids", "gids", "why"),
    [
        ([], [mapping()], r"userns_options\.uids has 0 mappings: exactly one is taken"),
        ([mapping()], [], r"userns_options\.gids has 0 mappings"),
        ([mapping(), mapping(2000)], [mapping()], r"uids has 2 mappings"),
        ([mapping(container=1)], [mapping()], r"uids\[0\]\.container_id is 1: .* container's root, 0"),
        ([mapping(length=0)], [mapping()], r"uids\[0\]\.length is 0"),
        ([mapping()], [mapping(2**32 - 5)], r"gids\[0\]\.host_id is 4294967291"),
    ],
)
def test_mappings_that_cannot_be(uids: list[cri.IdMapping], gids: list[cri.IdMapping], why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        options(cri.UserNamespace(mode=POD, uids=uids, gids=gids))


def test_the_node_has_no_mappings() -> None:
    with pytest.raises(InvalidArgument, match=r"userns_options\.gids is set, but mode is NODE"):
        options(cri.UserNamespace(mode=NODE, gids=[mapping()]))


@pytest.mark.parametrize("name", ["network", "pid", "ipc"])
def test_the_nodes_namespaces_do_not_go_with_it(name: str) -> None:
    userns.check_pod(WITH)
    node = {name: NamespaceMode.NODE}
    userns.check_pod(NamespaceOptions(**node))
    with pytest.raises(InvalidArgument, match=f"{name} is NODE"):
        userns.check_pod(WITH.model_copy(update=node))


def test_a_container_has_the_pods_or_says_nothing() -> None:
    for pod in (WITH, NODES, NamespaceOptions()):
        userns.check_container(pod, pod, ())
        userns.check_container(pod, NamespaceOptions(), ())
    userns.check_container(NamespaceOptions(), NODES, ())
    other = UserNamespace(uids=IDS.uids, gids=IDS.uids)
    for container in (NODES, NamespaceOptions(userns_mode=NamespaceMode.POD, userns=other)):
        with pytest.raises(
            InvalidArgument, match=r"that of the pod is POD \(uids 0 1000 10, gids 0 2000 20\)"
        ):
            userns.check_container(WITH, container, ())
    with pytest.raises(InvalidArgument, match="that of the pod is NODE"):
        userns.check_container(NODES, WITH, ())


def test_a_mount_has_the_pods_ids_or_none() -> None:
    plain = Mount(container_path="/a", host_path="/b")
    mapped = plain.model_copy(update={"ids": IDS})
    userns.check_container(WITH, WITH, (plain, mapped))
    with pytest.raises(InvalidArgument, match=r"config\.mounts\[1\]\.uid_mappings and gid_mappings are POD"):
        userns.check_container(NODES, NODES, (plain, mapped))
    assert [bind.mapped for bind in mounts.host_binds((plain, mapped), "c" * 64)] == [False, True]


@pytest.mark.parametrize(
    ("release", "old"),
    [
        ("6.1.0-50-cloud-amd64-0af3", True),
        ("5.15.0", True),
        ("6.2.0", False),
        ("6.12.117-bacf", False),
        ("7.0", False),
        ("10.1-x", False),
        ("", False),
    ],
)
def test_which_kernels_can(release: str, old: bool) -> None:
    assert bool(userns.too_old(release)) is old


@given(first=st.integers(0, 2**32 - 2), length=st.integers(1, 2**32 - 1), ident=st.integers(0, 2**32 - 1))
def test_ids_out_here(first: int, length: int, ident: int) -> None:
    ids = IdMap.parse(userns.map_line(IdMapping(host_id=first, length=length)))
    if ident < length:
        assert ids.of(ident) == first + ident
    else:
        with pytest.raises(InvalidArgument, match=f"id {ident} is not in the pod's user namespace"):
            ids.of(ident)


def spec(**user: Any) -> dict[str, Any]:
    return {
        "process": {"user": {"uid": 0, "gid": 0, "additionalGids": [], **user}},
        "linux": {"namespaces": [{"type": "mount"}]},
    }


def test_the_oci_spec_of_a_container() -> None:
    pod = PodUser(99, IdMap(1000, 10), IdMap(2000, 20))
    made = spec(uid=9, gid=19)
    pod.complete(made)
    assert made["linux"] == {
        "namespaces": [{"type": "mount"}, {"type": "user", "path": f"/proc/{os.getpid()}/fd/99"}],
        "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
        "gidMappings": [{"containerID": 0, "hostID": 2000, "size": 20}],
    }
    assert pod.owner(made["process"]["user"]) == (1009, 2019)
    pod.pids = PidNamespace(7, 98)
    made = spec()
    pod.complete(made)
    assert {"type": "pid", "path": f"/proc/{os.getpid()}/fd/98"} in made["linux"]["namespaces"]
    own = spec()
    own["linux"]["namespaces"] = [{"type": "pid"}]
    pod.complete(own)
    assert [item for item in own["linux"]["namespaces"] if item["type"] == "pid"] == [{"type": "pid"}]


@pytest.mark.parametrize("user", [{"uid": 10}, {"gid": 20}, {"additionalGids": [5, 20]}])
def test_users_beyond_the_mapping(user: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="is not in the pod's user namespace"):
        PodUser(99, IdMap(1000, 10), IdMap(2000, 20)).complete(spec(**user))
