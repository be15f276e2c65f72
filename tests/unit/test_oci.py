"""The OCI spec builder."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.errors import InvalidArgument
from hyperpod.model.security import LinuxResources
from hyperpod.spec.capabilities import ALL, DEFAULT, ambient, of_container
from hyperpod.spec.oci import MASKED_PATHS, RLIMITS, ContainerSpecInput, build_process, build_spec


def built(**changes: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(build_spec(ContainerSpecInput(**{"args": ("sh",), **changes})))
    return document


def test_defaults() -> None:
    spec = built()
    assert [n["type"] for n in spec["linux"]["namespaces"]] == ["pid", "ipc", "mount", "cgroup"]
    assert spec["process"]["user"] == {"uid": 0, "gid": 0, "additionalGids": []}
    assert spec["process"]["capabilities"]["bounding"] == sorted(DEFAULT)
    assert "inheritable" not in spec["process"]["capabilities"]
    assert spec["linux"]["resources"] == {"devices": [{"allow": False, "access": "rwm"}]}
    assert spec["linux"]["maskedPaths"] == list(MASKED_PATHS)
    assert "seccomp" not in spec["linux"]
    assert "rlimits" not in spec["process"]
    options = {m["destination"]: m["options"] for m in spec["mounts"]}
    assert "ro" in options["/sys"]
    assert "ro" in options["/sys/fs/cgroup"]


def test_what_is_given_is_in_it() -> None:
    resources = LinuxResources(
        cpu_period=1, cpu_quota=2, cpu_shares=3, memory_limit=4, memory_swap_limit=5, cpuset_cpus="0-1"
    )
    spec = built(
        env=(b"A=1", 'B=ü=\n"\\'.encode()),
        uid=5,
        gid=6,
        additional_gids=(7,),
        tty=True,
        readonly_rootfs=True,
        no_new_privileges=True,
        masked_paths=("/x",),
        readonly_paths=("/y",),
        resources=resources,
        annotations=(("a", "b"),),
        cwd="/w",
    )
    process, linux = spec["process"], spec["linux"]
    assert process["env"] == ["A=1", 'B=ü=\n"\\']
    assert process["user"] == {"uid": 5, "gid": 6, "additionalGids": [7]}
    assert (process["terminal"], process["noNewPrivileges"], process["cwd"]) == (True, True, "/w")
    assert spec["root"]["readonly"] is True
    assert (linux["maskedPaths"], linux["readonlyPaths"]) == (["/x"], ["/y"])
    assert linux["resources"]["cpu"] == {"period": 1, "quota": 2, "shares": 3, "cpus": "0-1"}
    assert linux["resources"]["memory"] == {"limit": 4, "swap": 5}
    assert spec["annotations"] == {"a": "b"}


def test_volumes_of_an_image() -> None:
    names = (
        "/data/",
        "/data",
        "/a/b",
        "/mine",
        "/",
        "",
        "/proc/sys",
        "/dev",
        "../up",
        "/x\0",
        "/\udcff",
        "/n\n",
    )
    mine = {"destination": "/mine", "type": "bind", "source": "/s", "options": []}
    spec = built(readonly_rootfs=True, declared_volumes=names, mounts=(mine,))
    assert spec["root"]["writable"] == ["/data", "/a/b", "/up"]
    asked = [m["destination"] for m in spec["mounts"]][-4:]
    assert asked == ["/mine", "/data", "/up", "/a/b"], "parents first"
    spec = built(declared_volumes=(*names, "/mine/in"), mounts=(mine,))
    assert spec["root"]["writable"] == ["/data", "/a/b", "/up"], "a writable root may not have them"
    spec = built(mounts=(mine,))
    assert "writable" not in spec["root"]
    assert [m["destination"] for m in spec["mounts"]][-1] == "/mine"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"args": ()}, "command"),
        ({"args": ("a\0b",)}, "argument 0"),
        ({"args": ("\udcff",)}, "argument 0"),
        ({"cwd": "relative"}, "relative"),
        ({"env": (b"NAME",)}, "NAME"),
        ({"env": (b"=x",)}, "no name"),
        ({"env": (b"NAME=\0",)}, "NUL"),
        ({"args": ("x" * (1 << 16),) * 16 + ("y",)}, "1048577"),
        ({"args": ("x", "\u00e9" * (1 << 16))}, "argument 1 has 131072 bytes"),
        ({"env": (b"A=" + b"x" * (1 << 17),)}, "'A' has 131074 bytes"),
        ({"add_capabilities": ("FLY",)}, "FLY"),
        ({"drop_capabilities": ("CAP_FLY",)}, "CAP_FLY"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        built(**changes)


@given(st.lists(st.binary(max_size=20).filter(lambda value: b"\0" not in value)))
def test_every_variable_is_carried(values: list[bytes]) -> None:
    """As text when it is UTF-8, else beside it in hexadecimal; nothing else is there for UTF-8 alone."""
    env = tuple(b"V%d=%s" % item for item in enumerate(values))
    process = json.loads(build_process(ContainerSpecInput(args=("x",), env=env)))
    binary = [bytes.fromhex(item) for item in process.get("binaryEnv", [])]
    assert sorted([*(item.encode() for item in process["env"]), *binary]) == sorted(env)
    assert process.get("binaryEnv") != []


@given(args=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1))
def test_arguments_survive(args: list[str]) -> None:
    process = json.loads(build_process(ContainerSpecInput(args=tuple(args))))
    assert process["args"] == args


def test_capabilities() -> None:
    assert of_container((), ()) == sorted(DEFAULT)
    assert of_container(("ALL",), ()) == sorted(ALL)
    assert of_container((), ("all",)) == []
    assert of_container(("net_admin",), ("ALL",)) == ["CAP_NET_ADMIN"]
    assert of_container(("ALL",), ("CAP_SYS_ADMIN",)) == sorted(set(ALL) - {"CAP_SYS_ADMIN"})
    assert of_container((), ("chown",)) == sorted(set(DEFAULT) - {"CAP_CHOWN"})
    assert of_container((), ("ALL",), ("net_raw", "CAP_KILL")) == ["CAP_KILL", "CAP_NET_RAW"]
    assert ambient(("net_raw", "CAP_KILL")) == ["CAP_KILL", "CAP_NET_RAW"]
    assert of_container((), ("ALL",), privileged=True) == sorted(ALL)


@given(
    add=st.lists(st.sampled_from([*ALL, "ALL"])),
    drop=st.lists(st.sampled_from([*ALL, "ALL"])),
    strip=st.booleans(),
)
def test_a_name_that_is_dropped_is_never_there(add: list[str], drop: list[str], strip: bool) -> None:
    given_names = [name.removeprefix("CAP_").lower() if strip else name for name in add]
    got = set(of_container(tuple(given_names), tuple(drop)))
    assert not got & set(drop)
    singles = set(add) - {"ALL"}
    start = set(ALL) if "ALL" in add else set(DEFAULT)
    assert got == (set() if "ALL" in drop else start) - set(drop) | singles - set(drop)


def test_ambient_capabilities_are_inheritable_too() -> None:
    sets = built(ambient_capabilities=("NET_RAW",), drop_capabilities=("ALL",))["process"]["capabilities"]
    assert all(sets[name] == ["CAP_NET_RAW"] for name in ("bounding", "effective", "permitted"))
    assert sets["ambient"] == sets["inheritable"] == ["CAP_NET_RAW"]


def test_privileged() -> None:
    spec = built(privileged=True, masked_paths=("/x",), readonly_paths=("/y",), drop_capabilities=("ALL",))
    assert spec["process"]["capabilities"]["bounding"] == sorted(ALL)
    assert (spec["linux"]["maskedPaths"], spec["linux"]["readonlyPaths"]) == ([], [])
    options = {m["destination"]: m["options"] for m in spec["mounts"]}
    assert "rw" in options["/sys"]
    assert "rw" in options["/sys/fs/cgroup"]
    assert "ro" not in options["/sys"] + options["/sys/fs/cgroup"]


def test_what_a_pod_shares() -> None:
    spec = built(own_pid=False, own_ipc=False)
    assert [n["type"] for n in spec["linux"]["namespaces"]] == ["mount", "cgroup"]
    (shm,) = [m for m in spec["mounts"] if m["destination"] == "/dev/shm"]
    assert (shm["type"], shm["source"]) == ("bind", "/dev/shm")
    assert {"nosuid", "noexec", "nodev"} <= set(shm["options"])


def test_limits() -> None:
    limits = {item["type"]: item for item in built(rlimits=RLIMITS)["process"]["rlimits"]}
    assert limits["RLIMIT_NOFILE"] == {"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 524288}
    assert limits["RLIMIT_CORE"]["soft"] == 0
