"""The plan of a container's mounts: order, overriding, and what is refused before anything is touched."""

from __future__ import annotations

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.cri import convert, replies
from hyperpod.errors import InvalidArgument
from hyperpod.model.mounts import Mount, Propagation
from hyperpod.spec import mountinfo
from hyperpod.spec.mounts import (
    MAX_MOUNTS,
    check,
    clean,
    covering,
    explained,
    host_binds,
    merged,
    oci_mounts,
)
from hyperpod.spec.share import place

ID = "0123456789abcdef" * 4
PATHS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60).map(
    "/".__add__
)


def wanted(*destinations: str) -> list[Mount]:
    return [Mount(container_path=path, host_path="/host") for path in destinations]


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/", "/"), ("//", "/"), ("/a//b/", "/a/b"), ("//a", "/a"), ("/a/../..", "/"), ("/a/./b", "/a/b")],
)
def test_paths_are_cleaned_as_go_does(path: str, expected: str) -> None:
    assert clean(path) == expected


@given(PATHS)
def test_a_cleaned_path_stays_below_the_root(path: str) -> None:
    cleaned = clean(path)
    assert cleaned.startswith("/")
    assert not cleaned.startswith("//")
    assert ".." not in cleaned.split("/")
    assert clean(cleaned) == cleaned == posixpath.normpath(cleaned)


@pytest.mark.parametrize(
    ("mount", "words"),
    [
        (Mount(container_path="", host_path="/h"), r"mounts\[0\]\.container_path is missing"),
        (Mount(container_path="/c", host_path=""), r"mounts\[0\]\.host_path is missing"),
        (Mount(container_path="c", host_path="/h"), r"container_path 'c' is not absolute"),
        (Mount(container_path="/c", host_path="h"), r"host_path 'h' is not absolute"),
        (Mount(container_path="/a/..", host_path="/h"), "container's root"),
        (Mount(container_path="/c", host_path="/h", recursive_read_only=True), "needs readonly"),
        (
            Mount(
                container_path="/c",
                host_path="/h",
                readonly=True,
                recursive_read_only=True,
                propagation=Propagation.HOST_TO_CONTAINER,
            ),
            "needs propagation PRIVATE",
        ),
    ],
)
def test_what_cannot_be_is_named(mount: Mount, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        check([mount])


def test_two_mounts_at_one_place_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"mounts\[2\]\.container_path '/a' is that of mounts\[0\] too"):
        check(wanted("/a", "/b", "/a/"))


def test_there_is_a_bound() -> None:
    check(wanted(*(f"/{n}" for n in range(MAX_MOUNTS))))
    with pytest.raises(InvalidArgument, match="at most"):
        check(wanted(*(f"/{n}" for n in range(MAX_MOUNTS + 1))))


def test_each_mount_has_a_place_of_its_own_and_parents_come_first() -> None:
    plan = wanted("/a/b/c", "/z", "/a/b", "/a")
    binds, mounts = host_binds(plan, ID), oci_mounts(plan, ID)
    assert [one.place for one in binds] == [f"0123456789ab/{n}" for n in range(4)]
    assert [mount["destination"] for mount in mounts] == ["/z", "/a", "/a/b", "/a/b/c"]
    sources = {mount["destination"]: mount["source"] for mount in mounts}
    for number, mount in enumerate(plan):
        assert sources[mount.container_path] == f"/run/hyperpod/share/{place(ID, number)}"


def test_options() -> None:
    plan = [
        Mount(container_path="/rw", host_path="/h"),
        Mount(container_path="/ro", host_path="/h", readonly=True),
        Mount(container_path="/s", host_path="/h", propagation=Propagation.HOST_TO_CONTAINER),
    ]
    assert [m["options"] for m in oci_mounts(plan, ID)] == [
        ["rbind", "rprivate", "rw"],
        ["rbind", "rprivate", "ro"],
        ["rbind", "rslave", "rw"],
    ]
    assert [(b.readonly, b.recursive, b.follow) for b in host_binds(plan, ID)] == [
        (False, False, False),
        (True, False, False),
        (False, False, True),
    ]
    assert "later host mounts appear" in explained(plan, {})["/s"]


def test_a_default_gives_way() -> None:
    defaults = [{"destination": d} for d in ("/proc", "/dev", "/dev/shm", "/dev/pts", "/etc/hosts")]
    wanted_there = [{"destination": "/dev/shm/", "mine": 1}, {"destination": "/etc/hosts", "mine": 1}]
    names = [m["destination"] for m in merged(defaults, wanted_there)]
    assert names == ["/proc", "/dev", "/dev/pts", "/dev/shm/", "/etc/hosts"]
    names = [m["destination"] for m in merged(defaults, [{"destination": "/dev"}])]
    assert names == ["/proc", "/etc/hosts", "/dev"]


def test_a_request_there_and_back() -> None:
    request = [
        cri.Mount(container_path="/b//c/", host_path="/h/../x", readonly=True, recursive_read_only=True),
        cri.Mount(
            container_path="/a",
            host_path="/h",
            selinux_relabel=True,
            propagation=cri.MountPropagation.PROPAGATION_HOST_TO_CONTAINER,
        ),
    ]
    config = convert.container_config(
        cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name="x"), image=cri.ImageSpec(image="x"), mounts=request
        )
    )
    assert [replies._mount(mount, "") for mount in config.mounts] == request


TABLE = rb"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
68 27 0:9 /x /with\040space\134\012 ro,nosuid master:7 propagate_from:2 - tmpfs none rw
garbage
"""


def test_mountinfo() -> None:
    found = mountinfo.parse(TABLE)
    assert sorted(found) == [22, 27, 68]
    assert [found[n].receives for n in (22, 27, 68)] == [False, True, True]
    assert [found[n].readonly for n in (22, 27, 68)] == [False, False, True]
    assert found[68].path == "/with space\\\n"


@given(st.binary(max_size=300))
def test_no_line_breaks_the_parser(line: bytes) -> None:
    mountinfo.parse(b"5 1 0:1 " + line)


@pytest.mark.parametrize(
    ("where", "path", "covers"),
    [
        ("/proc", "/proc/acpi", True),
        ("//proc/", "/proc", True),
        ("/proc", "/proc/../proc/x", True),
        ("/proc", "/processes", False),
        ("/proc/sys", "/proc", False),
    ],
)
def test_what_lies_at_or_below_a_propagating_mount(where: str, path: str, covers: bool) -> None:
    private = Mount(container_path=where, host_path="/h")
    shared = Mount(container_path=where, host_path="/h", propagation=Propagation.BIDIRECTIONAL)
    assert covering([private, shared], ["/other", path]) == ((1, path) if covers else None)
    assert covering([private], [path]) is None
