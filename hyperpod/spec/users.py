"""Whom a container's processes run as: a user string against the image's /etc/passwd and /etc/group.

The rules are containerd's (oci.WithUser, WithAdditionalGIDs), but for one: an entry whose ids are no numbers is
skipped, where containerd's parser reads them as 0 and so makes root of whom they name. Pure; both files come
from the image, so any bytes may be in them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hyperpod.errors import InvalidArgument

MAX_ID = 2**32 - 2
"""2**32 - 1 means "no change" to the kernel."""

MAX_GROUPS = 4096
"""Linux takes 65,536; so many would not fit into an answer of the agent."""

MAX_HOME = 4095
"""Bytes of a path (Linux: PATH_MAX, with its NUL)."""

_NUMBER = re.compile(r"[+-]?[0-9]+", re.ASCII)

Read = Callable[[], bytes]
"""Gives a file's content, empty when there is none; called at most once."""


@dataclass(frozen=True)
class Identity:
    """`groups` begins with `gid`, then the image's, then those that were asked for; each once."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str = "/"
    """Of its entry; what cannot be a variable's value is "/", as the home of whoever has no entry."""


def resolve(user: str, supplemental: Sequence[int], *, strict: bool, passwd: Read, group: Read) -> Identity:
    """`user`: a name or number, either may have `:group` after it; empty is root.

    `strict`: CRI's SupplementalGroupsPolicy; else the image's groups of that user are added. Without a `:group`
    the group is the one of the user's passwd entry; a number without an entry has group 0.
    Raises InvalidArgument that names who is not there.
    """
    owner, colon, team = user.partition(":")
    if ":" in team:
        raise InvalidArgument(f"user {_show(user)} has more than one ':'")
    entries = _users(passwd())
    number = _number(user, owner or "0")
    if number is None:
        name = owner.encode(errors="surrogateescape")
        entry = next((x for x in entries if x[0] == name), None)
        if entry is None:
            raise InvalidArgument(f"user {_show(owner)} is not in the image's /etc/passwd")
        uid = entry[1]
    else:
        entry = next((x for x in entries if x[1] == number), None)
        uid = number
    content: bytes | None = None
    gid = entry[2] if entry is not None and user else 0
    if colon:
        wanted = _number(user, team or "0")
        if wanted is None:
            content = group()
            name = team.encode(errors="surrogateescape")
            wanted = next((x[1] for x in _groups(content) if x[0] == name), None)
            if wanted is None:
                raise InvalidArgument(f"group {_show(team)} is not in the image's /etc/group")
        gid = wanted
    of_image: list[int] = []
    if not strict and entry is not None:
        content = group() if content is None else content
        of_image = [x[1] for x in _groups(content) if x[0] != entry[0] and entry[0] in x[2]]
    groups = tuple(dict.fromkeys((gid, *of_image, *supplemental)))
    if len(groups) > MAX_GROUPS:
        raise InvalidArgument(
            f"user {_show(user)} is in {len(groups)} groups, at most {MAX_GROUPS} are taken"
        )
    return Identity(uid, gid, groups, "/" if entry is None else _home(entry[3]))


def _home(field: bytes) -> str:
    try:
        text = field[: MAX_HOME + 1].decode()
    except UnicodeDecodeError:
        return "/"
    return text if text and "\0" not in text and len(field) <= MAX_HOME else "/"


def _number(user: str, part: str) -> int | None:
    """None for a name. A name of digits cannot be meant, as everywhere. Raises InvalidArgument."""
    if not _NUMBER.fullmatch(part):
        return None
    value = int(part) if len(part) < 20 else -1
    if not 0 <= value <= MAX_ID:
        raise InvalidArgument(f"user {_show(user)}: an id is 0 to {MAX_ID}")
    return value


def _show(user: str) -> str:
    return repr(user[:100])


def _id(field: bytes) -> int | None:
    """Of a file's field."""
    if not field.isdigit() or len(field) > 10 or (value := int(field)) > MAX_ID:
        return None
    return value


def _users(content: bytes) -> Iterator[tuple[bytes, int, int, bytes]]:
    """Name, uid, gid of each line of passwd(5) that has them, and the home folder, which may be empty."""
    for line in content.split(b"\n"):
        fields = line.strip().split(b":", 6)
        if len(fields) >= 4 and (uid := _id(fields[2])) is not None and (gid := _id(fields[3])) is not None:
            yield fields[0], uid, gid, fields[5] if len(fields) > 5 else b""


def _groups(content: bytes) -> Iterator[tuple[bytes, int, list[bytes]]]:
    """Name, gid and members of each line of group(5) that has them."""
    for line in content.split(b"\n"):
        fields = line.strip().split(b":", 3)
        if len(fields) >= 3 and (gid := _id(fields[2])) is not None:
            yield fields[0], gid, fields[3].split(b",") if len(fields) > 3 else []
