"""The canonical tar of a plan: a sequence of byte strings and of ranges of the layer's own stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hyperpod.spec.layers import FILE, FOLDER, HARD_LINK, Node, Plan
from hyperpod.spec.tarwrite import END, header, padding

OPAQUE_XATTR = b"trusted.overlay.opaque"


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes to be copied from the uncompressed layer. Successive ones never go backwards."""

    offset: int
    size: int


def emit(plan: Plan) -> Iterator[bytes | Copy]:
    """Pieces of the tar in order. The root folder is not in it: sqfstar ignores its entry."""
    for path, node in plan.folders:
        xattrs = dict(node.xattrs or {})
        if node.opaque:
            xattrs[OPAQUE_XATTR] = b"y"
        yield _header(path, FOLDER, node, xattrs)
    for path, node in plan.specials:
        yield _header(path, node.kind, node, node.xattrs)
    for path, node in plan.files:
        yield _header(path, FILE, node, node.xattrs)
        if node.size:
            yield Copy(node.offset, node.size)
            yield padding(node.size)
    for path, target, node in plan.links:
        yield header(
            path, HARD_LINK, mode=node.mode, uid=node.uid, gid=node.gid, mtime=node.mtime, link=target
        )
    yield END


def _header(path: bytes, kind: int, node: Node, xattrs: dict[bytes, bytes] | None) -> bytes:
    return header(
        path,
        kind,
        mode=node.mode,
        uid=node.uid,
        gid=node.gid,
        mtime=node.mtime,
        size=node.size,
        link=node.link,
        major=node.major,
        minor=node.minor,
        xattrs=xattrs,
    )
