"""The canonical tar of a plan: a sequence of byte strings and of ranges of the layer's own stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hyperpod.spec.layers import FILE, FOLDER, HARD_LINK, Node, Plan
from hyperpod.spec.tarwrite import END, header, padding

OPAQUE_XATTR = b"trusted.overlay.opaque"


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes to be copied from the uncompressed layer. Successive ones never go backwards."""

    offset: int
    size: int


def emit(plan: Plan, aliases: Mapping[int, int] = {}) -> Iterator[bytes | Copy]:
    """Pieces of the tar in order. The root folder is not in it: sqfstar ignores its entry.

    `aliases` replaces uids and gids."""
    for path, node in plan.folders:
        xattrs = dict(node.xattrs or {})
        if node.opaque:
            xattrs[OPAQUE_XATTR] = b"y"
        yield _header(path, FOLDER, node, xattrs, aliases)
    for path, node in plan.specials:
        yield _header(path, node.kind, node, node.xattrs, aliases)
    for path, node in plan.files:
        yield _header(path, FILE, node, node.xattrs, aliases)
        if node.size:
            yield Copy(node.offset, node.size)
            yield padding(node.size)
    for path, target, node in plan.links:
        yield header(
            path, HARD_LINK, mode=node.mode, uid=0, gid=0, mtime=0, link=target
        )  # only the link counts
    yield END


def _header(
    path: bytes, kind: int, node: Node, xattrs: dict[bytes, bytes] | None, aliases: Mapping[int, int]
) -> bytes:
    return header(
        path,
        kind,
        mode=node.mode,
        uid=aliases.get(node.uid, node.uid),
        gid=aliases.get(node.gid, node.gid),
        mtime=node.mtime,
        size=node.size,
        link=node.link,
        major=node.major,
        minor=node.minor,
        xattrs=xattrs,
    )
