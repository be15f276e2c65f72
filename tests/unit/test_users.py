"""Users of an image: containerd's rules, and files that anybody may have written."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.agent.security import FILE_LIMIT, read_in_root
from hyperpod.errors import InvalidArgument
from hyperpod.spec.users import MAX_GROUPS, MAX_HOME, MAX_ID, Identity, resolve

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
# a comment:x:9:9
daemon:x:1:1
bob:x:1000:1001:Bob:/home/bob:/bin/sh
1234:x:77:78::/:
bob:x:5:5:again:/:
odd:x:nine:ten:/:
high:x:4294967294:4294967294::/:
over:x:4294967295:1::/:
"""
GROUP = b"""root:x:0:root
wheel:x:10:root,bob
bob:x:1001:bob
team:x:50000:alice,bob
team:x:50001:
empty::60
broken:x:x:bob
eve:x:70:bobby
"""


def find(
    user: str, *supplemental: int, strict: bool = False, passwd: bytes = PASSWD, group: bytes = GROUP
) -> Identity:
    return resolve(user, supplemental, strict=strict, passwd=lambda: passwd, group=lambda: group)


@pytest.mark.parametrize(
    ("user", "want"),
    [
        ("", (0, 0, [0, 10])),
        ("root", (0, 0, [0, 10])),
        ("0", (0, 0, [0, 10])),
        ("bob", (1000, 1001, [1001, 10, 50000])),
        ("1000", (1000, 1001, [1001, 10, 50000])),
        ("+1000", (1000, 1001, [1001, 10, 50000])),
        ("1000:5", (1000, 5, [5, 10, 50000])),
        ("bob:team", (1000, 50000, [50000, 10])),
        ("bob:60", (1000, 60, [60, 10, 50000])),
        ("4711", (4711, 0, [0])),
        ("4711:wheel", (4711, 10, [10])),
        ("1234", (1234, 0, [0])),  # the number, not the user of that name
        ("77", (77, 78, [78])),
        ("bob:", (1000, 0, [0, 10, 50000])),
        (":team", (0, 50000, [50000, 10])),
        ("high", (MAX_ID, MAX_ID, [MAX_ID])),
    ],
)
def test_who_it_is(user: str, want: tuple[int, int, list[int]]) -> None:
    found = find(user)
    assert (found.uid, found.gid, list(found.groups)) == want


def test_supplemental_groups_come_last_and_once() -> None:
    assert find("bob", 7, 10, 7).groups == (1001, 10, 50000, 7)
    assert find("bob", 7, 10, 7, strict=True).groups == (1001, 7, 10)
    assert find("4711", 7, strict=True).groups == (0, 7)


def test_strict_leaves_the_image_s_groups_out() -> None:
    assert find("1000", 1234, strict=True) == Identity(1000, 1001, (1001, 1234), "/home/bob")
    assert find("", strict=True) == Identity(0, 0, (0,), "/root")


@pytest.mark.parametrize(
    ("user", "named"),
    [
        ("nobody", "user 'nobody' is not in the image's /etc/passwd"),
        ("odd", "'odd' is not in"),
        ("over", "'over' is not in"),
        ("bob:nogroup", "group 'nogroup' is not in the image's /etc/group"),
        ("a:b:c", "more than one ':'"),
        ("-1", "'-1'"),
        ("4294967295", "4294967295"),
        ("0:4294967295", "0:4294967295"),
        ("9" * 5000, "an id is 0 to"),
        ("\u0661", "is not in"),  # a digit, but not one of ours
    ],
)
def test_who_cannot_be_is_named(user: str, named: str) -> None:
    with pytest.raises(InvalidArgument) as info:
        find(user)
    assert named in str(info.value)
    assert len(str(info.value)) < 300


def test_no_file_is_as_good_as_an_empty_one() -> None:
    assert find("1000", 5, passwd=b"", group=b"") == Identity(1000, 0, (0, 5), "/")
    with pytest.raises(InvalidArgument, match="'root' is not in"):
        find("root", passwd=b"")


def test_only_what_is_needed_is_read() -> None:
    def never() -> bytes:
        raise AssertionError("read")

    strict = resolve("5:6", [7], strict=True, passwd=lambda: PASSWD, group=never)
    assert strict == Identity(5, 6, (6, 7), "/")
    assert resolve("5", [], strict=False, passwd=lambda: b"", group=never).gid == 0


@pytest.mark.parametrize(
    ("fields", "home"),
    [
        (b":Bob:/home/bob:/bin/sh", "/home/bob"),
        (b"::/home/b\xc3\xb6b", "/home/b\u00f6b"),
        (b"::/" + b"x" * (MAX_HOME - 1) + b":", "/" + "x" * (MAX_HOME - 1)),
        (b"::/" + b"x" * MAX_HOME + b":", "/"),
        (b"::/\xff:", "/"),
        (b"::/a\0b:", "/"),
        (b":::", "/"),
        (b":Bob", "/"),
        (b"", "/"),
    ],
)
def test_the_home_folder_is_the_entry_s(fields: bytes, home: str) -> None:
    assert find("bob", passwd=b"bob:x:5:6" + fields).home == home
    assert find("5", passwd=b"bob:x:5:6" + fields).home == home


def test_too_many_groups_are_refused() -> None:
    group = b"\n".join(b"g%d:x:%d:bob" % (n, n) for n in range(MAX_GROUPS + 1))
    with pytest.raises(InvalidArgument, match=r"in \d+ groups"):
        find("bob", group=group)


LINES = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.builds(
            lambda *fields: b":".join(fields),
            *[st.sampled_from([b"bob", b"0", b"", b"-1", b"00", b"4294967295", b"9" * 30, b"x", b"\xff\0"])]
            * 4,
        ),
    ),
    max_size=20,
).map(b"\n".join)


@given(
    user=st.one_of(st.text(max_size=12), st.sampled_from(["bob", "0", "bob:bob", ":", "0:0"])),
    supplemental=st.lists(st.integers(0, MAX_ID), max_size=4),
    strict=st.booleans(),
    passwd=LINES,
    group=LINES,
)
def test_any_bytes_give_a_possible_user_or_a_clear_error(
    user: str, supplemental: Sequence[int], strict: bool, passwd: bytes, group: bytes
) -> None:
    try:
        found = find(user, *supplemental, strict=strict, passwd=passwd, group=group)
    except InvalidArgument as exc:
        assert len(str(exc)) < 700
        return
    assert 0 <= found.uid <= MAX_ID and all(0 <= gid <= MAX_ID for gid in found.groups)
    assert found.groups[0] == found.gid
    assert found.home and "\0" not in found.home
    assert set(supplemental) <= set(found.groups)
    assert len(set(found.groups)) == len(found.groups)
    # Nobody becomes root but by a number 0, no number at all, or an entry that says so in digits.
    if found.uid == 0 and user.partition(":")[0].strip("+-0"):
        assert any(line.split(b":")[2:3] in ([b"0"], [b"00"]) for line in passwd.split(b"\n"))


# -- reading out of a root that is not ours ----------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "secret").write_text("host:x:0:0")
    return tmp_path / "root"


def read(root: Path) -> bytes:
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        return read_in_root(fd, "etc/passwd")
    finally:
        os.close(fd)


def test_links_stay_in_the_root(root: Path) -> None:
    passwd = root / "etc/passwd"
    (root / "real").write_text("inside")
    for target, want in (
        ("/real", b"inside"),
        ("../real", b"inside"),
        ("../../../../real", b"inside"),
        (str(root.parent / "secret"), b""),
        ("../../secret", b""),
        ("missing", b""),
        ("/real/x", b""),
    ):
        passwd.symlink_to(target)
        assert read(root) == want, target
        passwd.unlink()
    (root / "etc").rmdir()
    (root / "etc").symlink_to("/")
    (root / "passwd").write_text("at the top")
    assert read(root) == b"at the top"


def test_what_is_no_file_is_refused(root: Path) -> None:
    passwd = root / "etc/passwd"
    assert read(root) == b""
    passwd.mkdir()
    with pytest.raises(InvalidArgument, match="/etc/passwd is not a file"):
        read(root)
    passwd.rmdir()
    os.mkfifo(passwd)
    assert stat.S_ISFIFO(passwd.stat().st_mode)
    with pytest.raises(InvalidArgument, match="not a file"):
        read(root)
    passwd.unlink()
    passwd.symlink_to("passwd")
    with pytest.raises(InvalidArgument, match="Too many levels"):
        read(root)
    passwd.unlink()
    passwd.symlink_to("/proc/self/fd/0")
    assert read(root) == b""


def test_a_huge_file_is_refused(root: Path) -> None:
    passwd = root / "etc/passwd"
    passwd.write_bytes(b"\n" * FILE_LIMIT)
    assert len(read(root)) == FILE_LIMIT
    os.truncate(passwd, 1 << 40)
    with pytest.raises(InvalidArgument, match="larger than 1048576 bytes"):
        read(root)
