"""Folders that a layer only implies: something lies below them, and its own tar says nothing of them.

Such a folder is the one of the layers beneath, so mode, owner and attributes are looked up there, as containerd
does when it applies a layer. Else one file below /tmp, in a layer of a tool that writes no entries for folders,
would make /tmp root's alone. What is found nowhere, or is no folder there, is root's with mode 0755.

A layer tells those above it what it holds in lines of JSON, one for each name: [path] for what is no folder, [path,
null] for a folder that it only implies as well, [path, [mode, uid, gid, {attribute: value}]]. Bytes are Latin-1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import accumulate

from hyperpod.spec.layers import Node, Plan

_DEFAULT = [0o755, 0, 0, {}]
_FOLDER, _OTHER = None, False
"""What is known of a path: a folder that is implied, no folder; else what a line says."""


def told(plan: Plan) -> Iterator[bytes]:
    """The lines of a layer, without those of the root: nothing implies that."""
    for path, node in plan.folders:
        yield _line(path, None if node.implied else _said(node))
    for path, _ in (*plan.specials, *plan.files):
        yield _line(path)
    for path, _, _ in plan.links:
        yield _line(path)


def inherit(plan: Plan, below: Iterable[Iterable[bytes]]) -> str:
    """Give the implied folders of a plan what the layers below it tell, topmost first.

    Gives a digest, in hexadecimal, of all that differs from root's 0755; empty when nothing does. Raises
    ResourceExhausted for too many owners."""
    missing = {path: node for path, node in plan.folders if node.implied}
    given: list[object] = []
    for lines in below:
        if not missing:
            break
        asked = {above for path in missing for above in _down_to(path)}
        known = {path: what for path, what in map(_read, lines) if path in asked}
        for path, node in list(missing.items()):
            what = _found(path, known)
            if what is _FOLDER:
                continue
            del missing[path]
            if isinstance(what, list) and what != _DEFAULT:
                given.append([_text(path), what])
                node.mode, node.uid, node.gid = what[:3]
                node.xattrs = {_bytes(key): _bytes(value) for key, value in what[3].items()} or None
                plan.ids.update((node.uid, node.gid))
    plan.bound_ids()
    return hashlib.sha256(json.dumps(sorted(given)).encode()).hexdigest() if given else ""


def _found(path: bytes, known: dict[bytes, object]) -> object:
    """What one layer says of a path; it says of a folder that it has not that this lies further down."""
    what: object = _FOLDER
    for above in _down_to(path):
        what = known.get(above, _FOLDER)
        if what is _OTHER or above not in known:
            break
    return what


def _down_to(path: bytes) -> Iterator[bytes]:
    """a, a/b, a/b/c."""
    return accumulate(path.split(b"/"), lambda above, name: above + b"/" + name)


def _said(node: Node) -> list[object]:
    attributes = {_text(key): _text(value) for key, value in sorted((node.xattrs or {}).items())}
    return [node.mode, node.uid, node.gid, attributes]


def _line(path: bytes, *what: object) -> bytes:
    return json.dumps([_text(path), *what]).encode() + b"\n"


def _read(line: bytes) -> tuple[bytes, object]:
    path, *what = json.loads(line)
    return _bytes(path), what[0] if what else _OTHER


def _text(raw: bytes) -> str:
    return raw.decode("latin-1")


def _bytes(text: str) -> bytes:
    return text.encode("latin-1")
