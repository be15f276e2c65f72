"""From the entries of a layer's tar to a canonical plan: what an image builder is given, in which order.

Applying a layer means replaying its entries on a folder. `LayerTree` replays them on a tree in memory, so
that duplicates, folders turned into files, links to replaced files and entries below symlinks come out as on
a disk, contained in the root. Whiteouts hide what *lower* layers hold (OCI image-spec, layer.md), whatever
their place in the tar, and become overlayfs's own marks: a character device 0:0, an opaque attribute.

Order of the plan: folders before what they hold, entries without contents, files in the order of the stream
(one forward pass serves them), hard links last.

A parent folder that the layer does not mention is `implied`, and until parents.py has asked the layers below it,
root's with mode 0755.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from hyperpod.errors import ImageError, ResourceExhausted
from hyperpod.spec.tarindex import Entry, show

FILE, HARD_LINK, SYMLINK, CHAR, BLOCK_DEVICE, FOLDER, FIFO = range(7)
MAX_NAME = 255
MAX_PATH = 4095
MAX_DEPTH = 1024
MAX_HOPS = 40
"""Symlinks followed for one path, as Linux does (ELOOP)."""
MAX_IDS = 65535
"""Different uids and gids in one squashfs."""
MAX_TIME = 0xFFFFFFFF
"""squashfs keeps times in 32 unsigned bits of seconds."""
MAX_XATTRS = 65536
"""Bytes of attributes of one entry."""
_WH = b".wh."
_WH_META = b".wh..wh."
_OPAQUE = b".wh..wh..opq"
_UNRESOLVED = -1  # kind of a hard link whose target has not come yet


@dataclass(slots=True, eq=False)
class Node:
    """A file system object. Several names may lead to one (hard links); a folder has `children`."""

    kind: int
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    size: int = 0
    offset: int = 0
    link: bytes = b""
    major: int = 0
    minor: int = 0
    xattrs: dict[bytes, bytes] | None = None
    children: dict[bytes, Node] | None = None
    whiteouts: set[bytes] | None = None
    opaque: bool = False
    implied: bool = False
    """A folder that only what lies below it tells of."""
    first: bytes = b""
    """Path that the plan gave it first."""


@dataclass(slots=True)
class Plan:
    """Lists of (path without leading slash, object). Paths of `links` are followed by the path linked to."""

    root: Node
    folders: list[tuple[bytes, Node]] = field(default_factory=list)
    specials: list[tuple[bytes, Node]] = field(default_factory=list)
    files: list[tuple[bytes, Node]] = field(default_factory=list)
    links: list[tuple[bytes, bytes, Node]] = field(default_factory=list)
    ids: set[int] = field(default_factory=set)
    """uids and gids of all but the root."""

    @property
    def implies(self) -> bool:
        """Layers below may have something to say of its folders."""
        return any(node.implied for _, node in self.folders)

    def bound_ids(self) -> None:
        """Raises ResourceExhausted when the ids are too many for one image."""
        if len(self.ids) > MAX_IDS - 2:
            raise ResourceExhausted(
                f"the layer has {len(self.ids)} different user and group ids, {MAX_IDS - 2} fit"
            )

    @property
    def opaque_root(self) -> bool:
        """The layer hides everything below it."""
        return self.root.opaque


class LayerTree:
    """Replays entries; `plan` at the end. Raises ImageError for what no runtime could apply."""

    def __init__(self, max_nodes: int) -> None:
        self.root = Node(FOLDER, children={})
        self._nodes, self._max_nodes = 0, max_nodes

    def add(self, entry: Entry) -> None:
        parts = _clean(entry.name)
        if not parts:
            if entry.kind != FOLDER:
                raise ImageError(f"tar entry {show(entry.name)} replaces the root folder")
            self._describe(self.root, entry)
            return
        if parts[0].startswith(_WH_META) and parts != [_OPAQUE]:
            return  # bookkeeping of aufs
        parent = self._look(parts[:-1], entry.name, create=True)
        name = parts[-1]
        assert parent is not None and parent.children is not None
        if name.startswith(_WH):
            self._whiteout(parent, name, entry.name)
        elif entry.kind == CHAR and entry.major == 0 and entry.minor == 0:
            parent.children.pop(name, None)
            self._hide(parent, name)
        elif entry.kind == HARD_LINK:
            parent.children[name] = self._target(entry.link, entry.name) or self._node(
                _UNRESOLVED, link=entry.link
            )
        elif entry.kind == FOLDER:
            old = parent.children.get(name)
            if old is None or old.kind != FOLDER:
                old = parent.children[name] = self._node(FOLDER, children={})
            self._describe(old, entry)
        else:
            if entry.kind == SYMLINK and not 0 < len(entry.link) <= MAX_PATH:
                raise ImageError(f"symlink {show(entry.name)} has a target of {len(entry.link)} bytes")
            node = self._node(entry.kind, size=entry.size, offset=entry.offset, link=entry.link)
            node.major, node.minor = entry.major, entry.minor
            self._describe(node, entry)
            parent.children[name] = node

    def plan(self) -> Plan:
        """The canonical order. Raises ImageError for hard links without a target in this layer."""
        plan = Plan(self.root)
        stack: list[tuple[bytes, Node]] = [(b"", self.root)]
        while stack:
            path, folder = stack.pop()
            if folder is not self.root:
                plan.folders.append((path, folder))
                plan.ids.update((folder.uid, folder.gid))
            below: list[tuple[bytes, Node]] = []
            for name, child in self._contents(folder, path):
                full = path + b"/" + name if path else name
                if len(full) > MAX_PATH:
                    raise ImageError(f"path {show(full)} in the layer is longer than {MAX_PATH} bytes")
                if child.kind == FOLDER:
                    below.append((full, child))
                elif child.first:
                    plan.links.append((full, child.first, child))
                else:
                    child.first = full
                    (plan.files if child.kind == FILE else plan.specials).append((full, child))
                    plan.ids.update((child.uid, child.gid))
            stack.extend(reversed(below))
        plan.bound_ids()
        plan.files.sort(key=lambda item: item[1].offset)
        return plan

    def _contents(self, folder: Node, path: bytes) -> Iterator[tuple[bytes, Node]]:
        """Names in order, whiteouts among them, hard links that came before their target resolved."""
        assert folder.children is not None
        for name in folder.whiteouts or ():
            child = folder.children.get(name)
            if child is None:
                if not folder.opaque:
                    folder.children[name] = Node(CHAR, mode=0)
            elif child.kind == FOLDER:
                child.opaque = True
        for name in sorted(folder.children):
            child = folder.children[name]
            if child.kind == _UNRESOLVED:
                child = self._resolve(child, path + b"/" + name)
                folder.children[name] = child
            yield name, child

    def _resolve(self, node: Node, where: bytes) -> Node:
        for _ in range(MAX_HOPS):
            target = self._target(node.link, where)
            if target is None:
                raise ImageError(
                    f"hard link {show(where)} leads to {show(node.link)}, which is not in its layer"
                )
            if target.kind != _UNRESOLVED:
                return target
            node = target
        raise ImageError(f"hard link {show(where)} leads to a chain or circle of hard links")

    def _node(self, kind: int, **fields: object) -> Node:
        self._nodes += 1
        if self._nodes > self._max_nodes:
            raise ResourceExhausted(f"the layer makes more than {self._max_nodes} files and folders")
        return Node(kind, **fields)  # type: ignore[arg-type]  # keyword pass-through of typed callers

    @staticmethod
    def _describe(node: Node, entry: Entry) -> None:
        for what, value in (("user", entry.uid), ("group", entry.gid)):
            if not 0 <= value < 2**32 - 1:
                raise ImageError(f"tar entry {show(entry.name)} has the {what} id {value}")
        if not (0 <= entry.major < 1 << 12 and 0 <= entry.minor < 1 << 20):
            raise ImageError(f"device {show(entry.name)} has the number {entry.major}:{entry.minor}")
        node.implied = False
        node.mode = stat.S_IMODE(entry.mode)
        node.uid, node.gid = entry.uid, entry.gid
        node.mtime = min(max(entry.mtime, 0), MAX_TIME)
        node.xattrs = _kept(entry) or None

    def _look(self, parts: list[bytes], where: bytes, *, create: bool) -> Node | None:
        """The folder `parts` leads to, symlinks followed inside the root; missing folders made, or None."""
        trail = [self.root]
        todo = parts[::-1]
        hops = 0
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if len(trail) > 1:
                    trail.pop()
                continue
            here = trail[-1]
            assert here.children is not None
            child = here.children.get(part)
            if child is None:
                if not create:
                    return None
                _check_name(part, where)
                child = here.children[part] = self._node(FOLDER, children={}, implied=True)
            if child.kind == FOLDER:
                trail.append(child)
                if len(trail) > MAX_DEPTH:
                    raise ImageError(f"tar entry {show(where)} lies deeper than {MAX_DEPTH} folders")
            elif child.kind == SYMLINK:
                hops += 1
                if hops > MAX_HOPS:
                    raise ImageError(f"tar entry {show(where)} lies below a circle of symlinks")
                if child.link.startswith(b"/"):
                    del trail[1:]
                todo.extend(child.link.split(b"/")[::-1])
            else:
                raise ImageError(f"tar entry {show(where)} lies below {show(part)}, which is no folder")
        return trail[-1]

    def _target(self, link: bytes, where: bytes) -> Node | None:
        """What a hard link leads to, as far as it is known; the last part is not followed (link(2))."""
        parts = _clean(link)
        if not parts:
            raise ImageError(f"hard link {show(where)} leads to the root folder")
        parent = self._look(parts[:-1], where, create=False)
        node = parent.children.get(parts[-1]) if parent and parent.children else None
        if node is not None and node.kind == FOLDER:
            raise ImageError(f"hard link {show(where)} leads to the folder {show(link)}")
        return node

    def _whiteout(self, parent: Node, name: bytes, where: bytes) -> None:
        if name == _OPAQUE:
            parent.opaque = True
        elif not name.startswith(_WH_META):
            hidden = name[len(_WH) :]
            if hidden in (b"", b".", b".."):
                raise ImageError(f"whiteout {show(where)} hides no name")
            self._hide(parent, hidden)

    def _hide(self, parent: Node, name: bytes) -> None:
        self._nodes += 1
        if parent.whiteouts is None:
            parent.whiteouts = set()
        parent.whiteouts.add(name)


def _clean(name: bytes) -> list[bytes]:
    """Parts of a path: no leading slash, `.` and inner `..` resolved; `..` out of the root is refused."""
    if len(name) > MAX_PATH:
        raise ImageError(f"path {show(name)} in the layer is longer than {MAX_PATH} bytes")
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if not parts:
                raise ImageError(f"path {show(name)} in the layer leads out of the root by '..'")
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    for part in parts[:-1]:
        if part.startswith(_WH) and not parts[0].startswith(_WH_META):
            raise ImageError(f"path {show(name)} in the layer lies below a whiteout")
    if parts:
        _check_name(parts[-1].removeprefix(_WH), name)
    return parts


def _check_name(part: bytes, where: bytes) -> None:
    if len(part) > MAX_NAME:
        raise ImageError(f"a name in {show(where)} is longer than {MAX_NAME} bytes")


def _kept(entry: Entry) -> dict[bytes, bytes]:
    """What a container may see: file capabilities and user.*; trusted.* would be overlayfs's own."""
    kept = {
        key: value
        for key, value in entry.xattrs.items()
        if key == b"security.capability" or key[:5] == b"user."
    }
    if sum(len(k) + len(v) for k, v in kept.items()) > MAX_XATTRS:
        raise ResourceExhausted(
            f"tar entry {show(entry.name)} has more than {MAX_XATTRS} bytes of attributes"
        )
    for key in kept:
        if not 5 < len(key) <= MAX_NAME:
            raise ImageError(f"tar entry {show(entry.name)} has an attribute name of {len(key)} bytes")
    return kept
