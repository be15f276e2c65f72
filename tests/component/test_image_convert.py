"""Layers through the real worker and sqfstar, read back by unsquashfs; hostile ones refused whole."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hyperpod.errors import HyperpodError, ImageError, ResourceExhausted
from hyperpod.image.convert import LayerFiles
from hyperpod.image.settings import ImageSettings, Limits
from tests import imagekit as kit
from tests.component.imagestore import layer_files, opened, passable_folder
from tests.imagekit import Item, folder, hardlink, symlink


@pytest.fixture
def state() -> Iterator[Path]:
    with passable_folder() as path:
        yield path


async def unpacked(state: Path, *layers: bytes, **more: Any) -> list[Path]:
    """Load an image of these layers and unpack each of its layer files."""
    layout = kit.write_layout(state / "layout", kit.image(*layers, **more), "made")
    async with opened(state) as store:
        (image,) = await store.load(layout)
        files = store.lease(image.id, "test")
    trees = []
    for number, file in enumerate(files):
        tree = state / f"tree{number}"
        subprocess.run(["unsquashfs", "-q", "-n", "-d", tree, file.path], check=True, capture_output=True)
        trees.append(tree)
    return trees


async def test_everything_survives(state: Path) -> None:
    long = "n" * 200 + "/" + "m" * 200
    raw = kit.tar(
        folder("./", 0o750, uid=3, gid=4, mtime=77),
        folder("d", 0o1770, uid=70_000, gid=4_000_000_000, mtime=5),
        Item("d/f", b"contents" * 99_999, mode=0o4755, uid=64_999, mtime=1_700_000_000),
        hardlink("early", "late"),
        Item("late", b"late"),
        Item("twice", b"old"),
        Item("twice", b"new"),
        Item(long, b"long"),
        Item("sp ace\n\xff".encode("latin-1").decode("utf-8", "surrogateescape"), b"odd"),
        symlink("s", "../" * 9 + "etc/passwd"),
        Item("fifo", kind=tarfile.FIFOTYPE),
        Item("null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666),
        Item("blk", kind=tarfile.BLKTYPE, device=(259, 70_000)),
        Item(
            "cap",
            b"#!",
            pax={"SCHILY.xattr.user.note": "a=b\nc", "SCHILY.xattr.trusted.overlay.redirect": "/"},
        ),
        Item("old", mtime=-1),
        Item("future", mtime=1 << 34),
    )
    (tree,) = await unpacked(state, raw)
    root = tree.stat()
    assert (stat.S_IMODE(root.st_mode), root.st_uid, root.st_gid, int(root.st_mtime)) == (0o750, 3, 4, 77)
    d, f = (tree / "d").stat(), (tree / "d/f").stat()
    assert (stat.S_IMODE(d.st_mode), d.st_uid, d.st_gid, int(d.st_mtime)) == (
        0o1770,
        70_000,
        4_000_000_000,
        5,
    )
    assert (stat.S_IMODE(f.st_mode), f.st_uid, int(f.st_mtime)) == (0o4755, 64_999, 1_700_000_000)
    assert (tree / "d/f").read_bytes() == b"contents" * 99_999
    assert (tree / "early").stat().st_ino == (tree / "late").stat().st_ino
    assert (tree / "twice").read_bytes() == b"new"
    assert (tree / long).read_bytes() == b"long"
    assert Path(os.fsdecode(os.fsencode(tree) + b"/sp ace\n\xff")).read_bytes() == b"odd"
    assert str((tree / "s").readlink()) == "../" * 9 + "etc/passwd"
    assert stat.S_ISFIFO((tree / "fifo").stat().st_mode)
    assert (tree / "null").stat().st_rdev == os.makedev(1, 3)
    assert (tree / "blk").stat().st_rdev == os.makedev(259, 70_000)
    assert {name: os.getxattr(tree / "cap", name) for name in os.listxattr(tree / "cap")} == {
        "user.note": b"a=b\nc"
    }
    assert int((tree / "old").stat().st_mtime) == 0


async def test_whiteouts_become_overlay_marks(state: Path) -> None:
    raw = kit.tar(folder("d"), Item("d/x"), Item("d/.wh..wh..opq"), Item(".wh.gone"))
    (tree,) = await unpacked(state, raw)
    gone = (tree / "gone").stat()
    assert stat.S_ISCHR(gone.st_mode) and gone.st_rdev == 0
    assert os.getxattr(tree / "d", "trusted.overlay.opaque") == b"y"
    assert not list(tree.rglob(".wh*"))


@pytest.mark.parametrize("root", [(0, 0), (5, 5), (5, 6), (64_999, 64_998)])
async def test_owner_of_the_root_folder(state: Path, root: tuple[int, int]) -> None:
    raw = kit.tar(folder("./", 0o711, uid=root[0], gid=root[1]), Item("f", uid=9, gid=9))
    (tree,) = await unpacked(state, raw)
    assert (tree.stat().st_uid, tree.stat().st_gid) == root
    assert ((tree / "f").stat().st_uid, (tree / "f").stat().st_gid) == (9, 9)


async def test_same_layer_same_bytes(state: Path) -> None:
    raw = kit.tar(*(Item(f"f{n}", os.urandom(50_000), uid=n) for n in range(40)))
    built = kit.image(raw)
    images = []
    for name in ("a", "b"):
        (state / name).mkdir(mode=0o711)
        layout = kit.write_layout(state / name / "layout", built)
        async with opened(state / name) as store:
            (image,) = await store.load(layout)
            images.append(Path(store.lease(image.id, "x")[0].path).read_bytes())
    assert images[0] == images[1]


def _zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-cq"], input=data, check=True, capture_output=True).stdout


@pytest.mark.parametrize(
    ("packer", "suffix"),
    [
        (kit.pack, "+gzip"),
        (lambda raw: kit.pack(raw[:700]) + kit.pack(raw[700:]), "+gzip"),
        (_zstd, "+zstd"),
        (lambda raw: raw, ""),
        (kit.pack, "+zstd"),
    ],
    ids=["gzip", "gzip members", "zstd", "plain", "gzip called zstd"],
)
async def test_packings(state: Path, packer: Callable[[bytes], bytes], suffix: str) -> None:
    raw = kit.tar(Item("f", b"x" * 3_000_000))
    media = {"suffix": suffix} if suffix else {"packed": False}
    (tree,) = await unpacked(state, raw, packer=packer, **media)
    assert (tree / "f").read_bytes() == b"x" * 3_000_000


async def test_repeated_and_hidden_layers_are_left_out(state: Path) -> None:
    one, two = kit.tar(Item("one")), kit.tar(Item("two"))
    cut = kit.tar(Item(".wh..wh..opq"), Item("cut"))
    trees = await unpacked(state, two, cut, one, two, one)
    assert [sorted(p.name for p in tree.iterdir()) for tree in trees] == [["cut"], ["two"], ["one"]]


async def test_folders_that_a_layer_only_implies_are_those_below(
    state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A tool that writes no entries for folders must not take /tmp, or somebody's home, away from its users."""
    caplog.set_level(logging.INFO)
    one = kit.tar(folder("tmp", 0o1777), folder("me", 0o700, uid=1000, gid=100), folder("plain"))
    two = kit.tar(folder("tmp", 0o755))
    above, top = kit.tar(Item("tmp/x"), Item("me/a/b"), Item("plain/c")), kit.tar(Item("tmp/y"))
    built: dict[str, kit.Built] = {
        "open": kit.image(one, above, top),
        "closed": kit.image(two, above, top),
        "hidden": kit.image(one, kit.tar(Item(".wh..wh..opq"), Item("z")), above, top),
    }
    async with opened(state) as store:
        names: dict[str, list[str]] = {}
        for name, image in built.items():
            (loaded,) = await store.load(kit.write_layout(state / name, image, name))
            names[name] = [layer.file for layer in loaded.layers]
        assert (
            names["closed"][1:]
            == names["hidden"][1:]
            == [f"{kit.sha256(x).removeprefix('sha256:')}.squashfs" for x in (above, top)]
        )
        assert not {*names["open"][1:]} & {*names["closed"]}
        serials = [layer.name for image in store.list() for layer in image.layers]
        assert len(set(serials)) == len(layer_files(state)) == 7
        for number, file in enumerate(store.lease(built["open"].config_digest, "test")):
            tree = state / f"tree{number}"
            subprocess.run(["unsquashfs", "-q", "-n", "-d", tree, file.path], check=True, capture_output=True)
            told = {p.name: p.stat() for p in tree.iterdir()}
            assert {told["tmp"].st_mode & 0o7777} == {0o1777}
            if number == 1:
                home = told["me"]
                assert (home.st_mode & 0o7777, home.st_uid, home.st_gid) == (0o700, 1000, 100)
                assert told["plain"].st_mode & 0o7777 == 0o755 == (tree / "me/a").stat().st_mode & 0o7777
        caplog.clear()
        await store.load(state / "open")
        assert sum("here already, verified" in record.message for record in caplog.records) == 3
        store.release("test")
        for built_image in (built["closed"], built["hidden"], built["open"]):
            await store.remove(built_image.config_digest)
        assert layer_files(state) == []


BOMB = kit.tar(Item("zeros", bytes(8 << 20)))
SMALL = Limits(
    max_layer=4 << 20, max_entries=20, max_metadata=4096, ratio_floor=1 << 20, max_ratio=2, max_image=5 << 20
)
HOSTILE: list[tuple[str, bytes, dict[str, Any], type[HyperpodError], str]] = [
    ("dotdot", kit.tar(Item("../evil")), {}, ImageError, "leads out of the root"),
    ("link out", kit.tar(hardlink("l", "../../etc/shadow")), {}, ImageError, "leads out of the root"),
    ("dangling link", kit.tar(hardlink("l", "lower")), {}, ImageError, "not in its layer"),
    ("below file", kit.tar(Item("f"), Item("f/g")), {}, ImageError, "no folder"),
    ("circle", kit.tar(symlink("a", "a"), Item("a/b")), {}, ImageError, "circle"),
    ("bomb", BOMB, {}, ResourceExhausted, "ratio"),
    ("entries", kit.tar(*(Item(str(n)) for n in range(50))), {}, ResourceExhausted, "entries"),
    ("names", kit.tar(*(Item("n" * 240 + str(n)) for n in range(19))), {}, ResourceExhausted, "names"),
    ("no tar", b"\x7fELF" + bytes(600), {}, ImageError, "checksum"),
    ("cut", kit.tar(Item("f", b"x" * 2000))[:1500], {}, ImageError, "cut off"),
    ("diff id", kit.tar(Item("f")), {"diff_ids": [kit.sha256(b"other")]}, ImageError, "diff id is sha256:"),
    ("gzip cut", kit.tar(Item("f")), {"packer": lambda raw: kit.pack(raw)[:-9]}, ImageError, "gzip stream"),
    (
        "gzip junk",
        kit.tar(Item("f")),
        {"packer": lambda raw: kit.pack(raw) + b"junk"},
        ImageError,
        "gzip stream",
    ),
    ("zstd cut", kit.tar(Item("f")), {"packer": lambda raw: _zstd(raw)[:-5]}, ImageError, "zstd stream"),
]


@pytest.mark.parametrize(
    ("raw", "more", "kind", "why"), [x[1:] for x in HOSTILE], ids=[x[0] for x in HOSTILE]
)
async def test_hostile_layers_leave_nothing(
    state: Path, raw: bytes, more: dict[str, Any], kind: type[HyperpodError], why: str
) -> None:
    layout = kit.write_layout(state / "layout", kit.image(raw, **more), "bad")
    async with opened(state, SMALL) as store:
        with pytest.raises(kind) as caught:
            await store.load(layout)
        assert why in str(caught.value) and "layer" in str(caught.value)
        assert store.list() == [] and layer_files(state) == []
        good = kit.write_layout(state / "good", kit.image(kit.tar(Item("ok"))), "good")
        assert len(await store.load(good)) == 1


async def test_layers_too_large_only_together(state: Path) -> None:
    layers = [kit.tar(Item(name, bytes(3 << 20))) for name in ("a", "b")]
    layout = kit.write_layout(state / "layout", kit.image(*layers), "big")
    async with opened(state, Limits(max_image=5 << 20)) as store:
        with pytest.raises(ResourceExhausted, match="layers unpack to"):
            await store.load(layout)
    assert layer_files(state) == []


def test_a_file_that_somebody_may_still_write_is_no_layer(state: Path) -> None:
    """A converter that a hostile layer took over could leave a process behind that changes it later."""
    built, target = state / "layer.img", state / "layers" / "a.squashfs"
    target.parent.mkdir()
    files = LayerFiles(target.parent, ImageSettings())
    with built.open("wb") as late:
        late.write(b"hsqs")
        late.flush()
        with pytest.raises(ImageError, match="still open for writing"):
            files._install(built, target)
    assert not target.exists()
    files._install(built, target)
    assert target.read_bytes() == b"hsqs"
