"""Names of cgroups: paths, slices, mounts."""

from __future__ import annotations

import contextlib
import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.errors import InvalidArgument
from hyperpod.spec.cgroup import Hierarchy, hierarchies, owner, parent_folder, sandbox_folder

ID = "0123456789ab" + "c" * 52
SLICES = [".slice", "a--b.slice", "-a.slice", "a-.slice", "a b.slice", "--.slice", "/é.slice"]
SLICED = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod12_34.slice"


@pytest.mark.parametrize(
    ("parent", "folder"),
    [
        ("", "/hyperpod/0123456789ab"),
        ("/", "/hyperpod-0123456789ab"),
        ("/kubepods/burstable/pod1-2", "/kubepods/burstable/pod1-2/hyperpod-0123456789ab"),
        ("kubepods//pod1/", "/kubepods/pod1/hyperpod-0123456789ab"),
        ("kubepods-burstable-pod12_34.slice", f"{SLICED}/hyperpod-0123456789ab"),
        (SLICED, f"{SLICED}/hyperpod-0123456789ab"),
        ("/system.slice", "/system.slice/hyperpod-0123456789ab"),
        ("-.slice", "/hyperpod-0123456789ab"),
        ("/a-b/c-d.slice", "/a-b/c-d.slice/hyperpod-0123456789ab"),
        ("...", "/.../hyperpod-0123456789ab"),
    ],
)
def test_places(parent: str, folder: str) -> None:
    assert sandbox_folder(parent, ID) == folder
    assert owner(folder) == ID[:12]


@pytest.mark.parametrize(
    "parent",
    [
        "..",
        "../x",
        "/a/../b",
        "/a/..",
        "a/./b",
        "/a\nb",
        "/a\x7f",
        "/" + "x" * 256,
        "/" + "é" * 128,
        "/a/cgroup.procs",
        "tasks/b",
        *SLICES,
    ],
)
def test_what_names_no_cgroup_is_refused(parent: str) -> None:
    with pytest.raises(InvalidArgument, match="cgroup_parent"):
        parent_folder(parent)


@given(
    st.text(max_size=40) | st.text("./-a", max_size=12) | st.text("a-.", max_size=8).map("{}.slice".format)
)
def test_no_parent_leads_out_of_the_tree(parent: str) -> None:
    with contextlib.suppress(InvalidArgument):
        folder = sandbox_folder(parent, ID)
        assert posixpath.normpath(folder) == folder
        assert folder.startswith("/")
        assert owner(folder) == ID[:12]


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/hyperpod",
        "/x/0123456789ab",
        "/hyperpod/0123456789a",
        "/hyperpod/0123456789ab/x",
        "/hyperpod-",
        "/hyperpod/",
        "/kubepods",
        "/hyperpod-0123456789ab/",
        "/hyperpod-test-0123456789ab",
    ],
)
def test_other_cgroups_are_nobodys(path: str) -> None:
    """Removal kills: it must never take a pod's cgroup, a common parent or the root for a sandbox's."""
    assert owner(path) is None


V1 = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
36 31 0:33 / /sys/fs/cgroup/my\\040devices rw,relatime - cgroup cgroup rw,devices
39 31 0:36 / /sys/fs/cgroup/pids ro,relatime - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime shared:1 master:2 - cgroup cgroup rw,xattr,name=systemd
42 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
43 31 0:39 / /sys/fs/cgroup/freezer rw - cgroup cgroup ro,freezer
90 31 0:29 / /var/lib/box/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
"""


def test_mounts() -> None:
    assert hierarchies(V1) == (
        Hierarchy("/sys/fs/cgroup/cpu,cpuacct", False, frozenset({"cpu", "cpuacct"})),
        Hierarchy("/sys/fs/cgroup/my devices", False, frozenset({"devices"})),
        Hierarchy("/sys/fs/cgroup/systemd", False, frozenset({"xattr", "name=systemd"})),
        Hierarchy("/sys/fs/cgroup/unified", True),
    )
    v2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
    assert hierarchies(v2) == (Hierarchy("/sys/fs/cgroup", True),)
    assert hierarchies("") == hierarchies("nonsense\n\n - cgroup\n") == ()
