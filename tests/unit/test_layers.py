"""Tar entries to a canonical plan: each rule by example. A plan is checked as Python's tarfile reads it."""

from __future__ import annotations

import io
import tarfile

import pytest

from hyperpod.errors import ImageError, ResourceExhausted
from hyperpod.spec.layers import LayerTree, Plan
from hyperpod.spec.layertar import Copy, emit
from hyperpod.spec.tarindex import TarParser
from tests.imagekit import Item, folder, hardlink, symlink, tar


def plan_of(raw: bytes, *, step: int = 1 << 20, entries: int = 1000, metadata: int = 1 << 20) -> Plan:
    parser = TarParser(max_entries=entries, max_metadata=metadata)
    tree = LayerTree(max_nodes=2 * entries)
    for at in range(0, len(raw), step):
        for entry in parser.feed(raw[at : at + step]):
            tree.add(entry)
    parser.finish()
    return tree.plan()


def canonical(raw: bytes, **more: int) -> bytes:
    out = bytearray()
    last = 0
    for piece in emit(plan_of(raw, **more)):
        if isinstance(piece, Copy):
            assert piece.offset >= last, "a forward pass must do"
            last = piece.offset + piece.size
            out += raw[piece.offset : last]
        else:
            out += piece
    return bytes(out)


def listing(raw: bytes, **more: int) -> dict[str, str]:
    """Path to what is there, such as `file 644 0:0 data`."""
    found: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(canonical(raw, **more))) as archive:
        for info in archive:
            assert info.name not in found, "no duplicates"
            parent = info.name.rpartition("/")[0]
            assert not parent or found[parent].startswith("dir"), "parents first"
            tail = f"{info.mode:o} {info.uid}:{info.gid}"
            if info.isdir():
                opaque = info.pax_headers.get("SCHILY.xattr.trusted.overlay.opaque", "")
                found[info.name] = f"dir {tail}{' opaque' if opaque == 'y' else ''}"
            elif info.islnk():
                assert info.linkname in found, "targets first"
                found[info.name] = f"link {info.linkname}"
            elif info.issym():
                found[info.name] = f"symlink {info.linkname}"
            elif info.ischr() and (info.devmajor, info.devminor) == (0, 0):
                found[info.name] = "whiteout"
            elif info.isdev():
                found[info.name] = f"device {info.type.decode()} {info.devmajor}:{info.devminor}"
            else:
                file = archive.extractfile(info)
                assert file is not None
                found[info.name] = f"file {tail} {file.read().decode()}"
    return found


def test_plain() -> None:
    raw = tar(
        folder("d", 0o1777, uid=5, gid=6),
        Item("d/f", b"data", mode=0o4755, uid=1, gid=2),
        symlink("s", "d/f"),
    )
    expected = {"d": "dir 1777 5:6", "d/f": "file 4755 1:2 data", "s": "symlink d/f"}
    assert listing(raw) == expected
    assert listing(raw, step=1) == expected


def test_last_entry_wins_and_links_keep_the_old_contents() -> None:
    raw = tar(Item("a", b"1"), hardlink("b", "a"), Item("a", b"2"), Item("c", b"3"), Item("c", b"4"))
    assert listing(raw) == {"a": "file 644 0:0 2", "b": "file 644 0:0 1", "c": "file 644 0:0 4"}


def test_second_header_of_a_folder_keeps_its_contents() -> None:
    assert listing(tar(folder("d", 0o700), Item("d/f"), folder("d", 0o755)))["d"] == "dir 755 0:0"
    assert "d/f" in listing(tar(folder("d", 0o700), Item("d/f"), folder("d", 0o755)))


def test_file_over_folder_drops_what_it_held() -> None:
    assert listing(tar(folder("d"), Item("d/f"), Item("d", b"x"))) == {"d": "file 644 0:0 x"}


def test_missing_parents_are_made() -> None:
    assert listing(tar(Item("a/b/c"))) == {"a": "dir 755 0:0", "a/b": "dir 755 0:0", "a/b/c": "file 644 0:0 "}


def test_hard_link_before_its_target_and_in_chains() -> None:
    raw = tar(hardlink("z", "y"), hardlink("y", "x"), Item("x", b"!"))
    assert listing(raw) == {"x": "file 644 0:0 !", "y": "link x", "z": "link x"}


@pytest.mark.parametrize("target", ["other-layer", "d/none", "f/below"])
def test_hard_link_without_target(target: str) -> None:
    with pytest.raises(ImageError, match=r"hard link|lies below"):
        plan_of(tar(Item("f"), hardlink("l", target)))


def test_hard_link_circle_folder_and_root() -> None:
    with pytest.raises(ImageError, match="circle"):
        plan_of(tar(hardlink("a", "b"), hardlink("b", "a")))
    with pytest.raises(ImageError, match="folder"):
        plan_of(tar(folder("d"), hardlink("a", "d")))
    with pytest.raises(ImageError, match="root"):
        plan_of(tar(hardlink("a", "/")))


def test_paths_are_contained() -> None:
    raw = tar(Item("/abs", b"1"), Item("./dot", b"2"), Item("a/../in", b"3"), Item("//x//y", b"4"))
    assert set(listing(raw)) == {"abs", "dot", "in", "x", "x/y"}


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/..", "a/../.."])
def test_paths_out_of_the_root(name: str) -> None:
    with pytest.raises(ImageError, match=r"leads out of the root"):
        plan_of(tar(Item(name)))
    with pytest.raises(ImageError, match=r"leads out of the root"):
        plan_of(tar(hardlink("l", name)))


def test_entries_below_symlinks_land_inside_the_root() -> None:
    raw = tar(folder("usr"), folder("usr/lib"), symlink("lib", "usr/lib"), Item("lib/a", b"1"))
    assert listing(raw)["usr/lib/a"] == "file 644 0:0 1"
    raw = tar(symlink("up", "../../../../etc"), Item("up/a", b"1"))
    assert listing(raw) == {"etc": "dir 755 0:0", "up": "symlink ../../../../etc", "etc/a": "file 644 0:0 1"}
    raw = tar(folder("d"), symlink("d/s", "/t"), Item("d/s/a", b"1"))
    assert listing(raw)["t/a"] == "file 644 0:0 1"
    raw = tar(folder("d"), symlink("d/s", "../t"), Item("d/s/a", b"1"))
    assert listing(raw)["t/a"] == "file 644 0:0 1"


def test_entries_below_files_and_symlink_circles() -> None:
    with pytest.raises(ImageError, match="no folder"):
        plan_of(tar(Item("f"), Item("f/x")))
    with pytest.raises(ImageError, match="circle of symlinks"):
        plan_of(tar(symlink("a", "b"), symlink("b", "a"), Item("a/x")))


def test_folder_replaces_a_symlink_of_its_name() -> None:
    raw = tar(symlink("d", "/etc"), folder("d"), Item("d/f"))
    assert listing(raw) == {"d": "dir 755 0:0", "d/f": "file 644 0:0 "}


def test_whiteouts() -> None:
    raw = tar(folder("d"), Item("d/.wh.gone"), Item(".wh.top"))
    assert listing(raw) == {"d": "dir 755 0:0", "d/gone": "whiteout", "top": "whiteout"}


@pytest.mark.parametrize("first", [True, False])
def test_whiteouts_hide_lower_layers_only(first: bool) -> None:
    mark = [Item(".wh.f"), Item(".wh.d")]
    own = [Item("f", b"new"), folder("d"), Item("d/x")]
    assert listing(tar(*(mark + own if first else own + mark))) == {
        "d": "dir 755 0:0 opaque",
        "d/x": "file 644 0:0 ",
        "f": "file 644 0:0 new",
    }


def test_opaque_after_and_before_its_folder() -> None:
    assert listing(tar(folder("d"), Item("d/x"), Item("d/.wh..wh..opq")))["d"] == "dir 755 0:0 opaque"
    assert listing(tar(Item("d/.wh..wh..opq"), folder("d", 0o700)))["d"] == "dir 700 0:0 opaque"
    assert plan_of(tar(Item(".wh..wh..opq"))).opaque_root


def test_device_zero_is_a_whiteout_and_others_stay() -> None:
    raw = tar(Item("w", kind=tarfile.CHRTYPE), Item("null", kind=tarfile.CHRTYPE, device=(1, 3)))
    assert listing(raw) == {"w": "whiteout", "null": "device 3 1:3"}


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "d/.wh."])
def test_whiteouts_of_no_name(name: str) -> None:
    with pytest.raises(ImageError, match="whiteout"):
        plan_of(tar(Item(name)))


def test_aufs_bookkeeping_is_left_out_and_nothing_lies_below_a_whiteout() -> None:
    assert listing(tar(folder(".wh..wh.plnk"), Item(".wh..wh.plnk/1.2"), Item(".wh..wh.aufs"))) == {}
    with pytest.raises(ImageError, match="below a whiteout"):
        plan_of(tar(Item(".wh.a/b")))


def test_attributes() -> None:
    pax = {
        "SCHILY.xattr.user.a": "1",
        "SCHILY.xattr.security.capability": "c",
        "SCHILY.xattr.security.selinux": "no",
        "SCHILY.xattr.trusted.overlay.opaque": "y",
        "SCHILY.xattr.trusted.overlay.redirect": "/etc",
    }
    plan = plan_of(tar(folder("d", pax=pax)))
    assert plan.folders[0][1].xattrs == {b"user.a": b"1", b"security.capability": b"c"}
    assert listing(tar(folder("d", pax=pax)))["d"] == "dir 755 0:0", (
        "an attribute of the tar is no opaque mark"
    )


def test_times_are_clamped() -> None:
    raw = tar(Item("a", mtime=-5), Item("b", mtime=1 << 40), Item("c", mtime=7))
    assert [node.mtime for _, node in plan_of(raw).files] == [0, 0xFFFFFFFF, 7]


def test_large_ids_and_long_names_survive() -> None:
    name = "/".join(["n" * 200] * 3)
    raw = tar(Item(name, b"x", uid=4_000_000_000, gid=3_000_000_000), symlink("s", "t" * 300))
    assert listing(raw)[name] == "file 644 4000000000:3000000000 x"
    raw = tar(Item(name, b"x"), symlink("s", "t" * 300), format=tarfile.GNU_FORMAT)
    assert listing(raw)["s"] == "symlink " + "t" * 300
    ustar = tar(Item("p" * 100 + "/" + "q" * 90, b"x"), format=tarfile.USTAR_FORMAT)
    assert "p" * 100 + "/" + "q" * 90 in listing(ustar)


@pytest.mark.parametrize(
    ("item", "why"),
    [
        (Item("f", kind=b"S"), "sparse"),
        (Item("f", pax={"GNU.sparse.major": "1"}), "sparse"),
        (Item("f", kind=b"V"), "unknown type"),
        (Item("f" * 256), "longer than 255"),
        (Item("/".join(["n" * 250] * 17)), "longer than 4095"),
        (Item("f", uid=-1), "user id -1"),
        (symlink("s", ""), "0 bytes"),
        (Item("./"), "root folder"),
        (Item("/".join("d" * 1100)), "deeper than"),
        (Item("f", pax={"uid": "x"}), "PAX number"),
    ],
)
def test_refused(item: Item, why: str) -> None:
    with pytest.raises(ImageError) as caught:
        plan_of(tar(item))
    assert why in str(caught.value)


def test_symlinked_depth_is_bounded() -> None:
    deep = "/".join("d" * 900)
    with pytest.raises(ImageError, match="deeper than"):
        plan_of(tar(folder(deep), symlink("s", deep), folder("s/" + deep)))


def test_caps() -> None:
    many = tar(*(Item(str(n)) for n in range(12)))
    with pytest.raises(ResourceExhausted, match="more than 10 entries"):
        plan_of(many, entries=10)
    with pytest.raises(ResourceExhausted, match="makes more than"):
        plan_of(tar(Item("/".join("abcdefghij"))), entries=4)
    with pytest.raises(ResourceExhausted, match="names and attributes"):
        plan_of(tar(Item("x" * 90)), metadata=50)
    with pytest.raises(ResourceExhausted, match="user and group ids"):
        plan_of(tar(*(Item(str(n), uid=n, gid=40_000 + n) for n in range(33_000))), entries=40_000)


@pytest.mark.parametrize("cut", [100, 512, 1024, 1500, 1536])
def test_cut_off(cut: int) -> None:
    raw = tar(Item("f", b"x" * 600, pax={"k": "v"}))
    with pytest.raises(ImageError, match="cut off"):
        plan_of(raw[:cut])


def test_empty_and_unpadded_ends() -> None:
    assert listing(b"") == {}
    assert listing(tar(Item("f"))[:512]) == {"f": "file 644 0:0 "}
    assert listing(tar(Item("f")) + b"trailing") == {"f": "file 644 0:0 "}


@pytest.mark.parametrize(
    ("offset", "byte"),
    [(0, b"X"), (148, b"7"), (124, b"9"), (136, b"z")],
    ids=["name", "sum", "size", "time"],
)
def test_damaged_headers(offset: int, byte: bytes) -> None:
    raw = bytearray(tar(Item("f", b"x")))
    raw[offset : offset + 1] = byte
    with pytest.raises(ImageError):
        plan_of(bytes(raw))


def test_entries_after_the_end_mark() -> None:
    one = tar(Item("f"))
    with pytest.raises(ImageError, match="goes on"):
        plan_of(one[:512] + bytes(512) + one)


def test_huge_extension_header() -> None:
    raw = tar(Item("f", pax={"comment": "x" * (1 << 20)}))
    with pytest.raises(ImageError, match="extension header"):
        plan_of(raw)
