"""The planner against a naive model: the same entries replayed on a flat dictionary of paths."""

from __future__ import annotations

import io
import tarfile
from typing import TypeAlias

from hypothesis import given, settings
from hypothesis import strategies as st

from hyperpod.errors import ImageError
from tests.imagekit import Item, folder, hardlink, symlink, tar
from tests.unit.test_layers import canonical

Path: TypeAlias = tuple[str, ...]
Thing: TypeAlias = tuple[str, str, int]
"""Kind, detail (contents or target), serial number of the object: equal for hard links."""


class Refused(Exception):
    pass


class Model:
    """A disk as one dictionary; whiteouts beside it."""

    def __init__(self) -> None:
        self.disk: dict[Path, Thing] = {(): ("dir", "", 0)}
        self.hidden: set[Path] = set()
        self.opaque: set[Path] = set()
        self.serial = 0

    def follow(self, parts: list[str], make: bool) -> Path | None:
        here: Path = ()
        todo, hops = list(parts), 0
        while todo:
            part = todo.pop(0)
            if part in ("", "."):
                continue
            if part == "..":
                here = here[:-1]
                continue
            kind, target, _ = self.disk.get((*here, part), ("", "", 0))
            if not kind:
                if not make:
                    return None
                self.write((*here, part), "dir", "")
                kind = "dir"
            if kind == "dir":
                here = (*here, part)
            elif kind == "symlink":
                hops += 1
                if hops > 40:
                    raise Refused
                here = () if target.startswith("/") else here
                todo = target.split("/") + todo
            else:
                raise Refused
        return here

    def write(self, path: Path, kind: str, detail: str) -> None:
        self.erase(path)
        self.serial += 1
        self.disk[path] = (kind, detail, self.serial)

    def erase(self, path: Path) -> None:
        for known in [p for p in self.disk if p[: len(path)] == path]:
            del self.disk[known]
        for marks in (self.hidden, self.opaque):
            for known in [
                p for p in marks if p[: len(path)] == path and (len(p) > len(path) or marks is self.opaque)
            ]:
                marks.discard(known)

    def add(self, item: Item) -> None:
        parts = item.name.split("/")
        parent = self.follow(parts[:-1], make=True)
        assert parent is not None
        path = (*parent, parts[-1])
        if parts[-1] == ".wh..wh..opq":
            self.opaque.add(parent)
        elif parts[-1].startswith(".wh."):
            self.hidden.add((*parent, parts[-1][4:]))
        elif item.kind == tarfile.DIRTYPE:
            if self.disk.get(path, ("",))[0] != "dir":
                self.write(path, "dir", "")
        elif item.kind == tarfile.LNKTYPE:
            target = item.link.split("/")
            at = self.follow(target[:-1], make=False)
            found = self.disk.get((*at, target[-1])) if at is not None else None
            if found is None or found[0] == "dir":
                raise Refused
            if at is not None and (*at, target[-1]) != path:
                self.erase(path)
                self.disk[path] = found
        else:
            symbolic = item.kind == tarfile.SYMTYPE
            self.write(path, "symlink" if symbolic else "file", item.link if symbolic else item.data.decode())

    def result(self) -> dict[str, str]:
        found: dict[str, str] = {}
        groups: dict[int, str] = {}
        for path, (kind, detail, serial) in sorted(self.disk.items()):
            if not path:
                continue
            name = "/".join(path)
            if kind == "dir":
                opaque = path in self.opaque or path in self.hidden
                found[name] = "dir opaque" if opaque else "dir"
            else:
                found[name] = f"{kind} {detail} {groups.setdefault(serial, name)}"
        for path in self.hidden - self.disk.keys():
            parent = path[:-1]
            if parent not in self.opaque and parent not in self.hidden:
                found["/".join(path)] = "whiteout"
        return found


def real(raw: bytes) -> dict[str, str]:
    """The canonical tar in the model's words; hard link groups are named by their least path."""
    found: dict[str, str] = {}
    first: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(canonical(raw))) as archive:
        for info in archive:
            if info.isdir():
                opaque = "SCHILY.xattr.trusted.overlay.opaque" in info.pax_headers
                found[info.name] = "dir opaque" if opaque else "dir"
            elif info.ischr():
                found[info.name] = "whiteout"
            elif info.islnk():
                first[info.name] = info.linkname
            elif info.issym():
                found[info.name] = f"symlink {info.linkname}"
            else:
                file = archive.extractfile(info)
                assert file is not None
                found[info.name] = f"file {file.read().decode()}"
    groups: dict[str, list[str]] = {}
    for name, target in first.items():
        found[name] = found[target]
        groups.setdefault(target, [target]).append(name)
    for name, text in found.items():
        if text.startswith(("file", "symlink")):
            members = groups.get(first.get(name, name), [name])
            found[name] = f"{text} {min(members, key=lambda n: n.split('/'))}"
    return found


names = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join)
targets = st.one_of(names, names.map(lambda n: "/" + n), names.map(lambda n: "../" + n))
marks = st.builds(
    lambda n, base: Item("/".join([*n.split("/")[:-1], base])),
    names,
    st.sampled_from([".wh.a", ".wh.b", ".wh..wh..opq"]),
)
items = st.one_of(
    st.builds(Item, names, st.sampled_from([b"1", b"22", b""])),
    st.builds(folder, names),
    st.builds(symlink, names, targets),
    st.builds(hardlink, names, names),
    marks,
)


@settings(max_examples=400)
@given(st.lists(items, max_size=10))
def test_plan_equals_the_model(entries: list[Item]) -> None:
    model = Model()
    try:
        for item in entries:
            model.add(item)
        expected = model.result()
    except Refused:
        expected = None
    try:
        found = real(tar(*entries))
    except ImageError:
        found = None
    if expected is None and any(item.kind == tarfile.LNKTYPE for item in entries):
        return  # links to what comes later are supported here and not by the model
    assert found == expected
