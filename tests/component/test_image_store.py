"""The store over restarts, crashes, full disks, removals and leases; archives of every form."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hyperpod import errors
from hyperpod.image.settings import ImageSettings, Limits
from hyperpod.image.store import ImageStore
from hyperpod.store.records import write_atomic
from tests import imagekit as kit
from tests import registry as reg
from tests.component.imagestore import layer_files, opened, passable_folder
from tests.imagekit import Item

ONE, TWO = kit.tar(Item("one", b"1" * 5000)), kit.tar(Item("two", os.urandom(100_000)))
FIRST, SECOND = kit.image(ONE, TWO), kit.image(ONE)


@pytest.fixture
def state() -> Iterator[Path]:
    with passable_folder() as path:
        yield path


@pytest.fixture
async def store(state: Path) -> AsyncIterator[ImageStore]:
    async with opened(state / "s") as opened_store:
        yield opened_store


def layouts(state: Path) -> tuple[Path, Path]:
    first = kit.write_layout(state / "first", FIRST, "first:1")
    return first, kit.write_layout(state / "second", SECOND, "quay.io/x/second:2")


async def settled(store: ImageStore) -> None:
    """Until background removals are done."""
    async with asyncio.timeout(60):
        while store.sweeping:
            await asyncio.sleep(0.01)


async def test_archives_of_every_form(state: Path, store: ImageStore) -> None:
    first, _ = layouts(state)
    oci, packed, docker = state / "oci.tar", state / "oci.tar.gz", state / "docker.tar"
    oci.write_bytes(kit.layout_tar(first))
    packed.write_bytes(kit.pack(kit.layout_tar(first)))
    docker.write_bytes(
        kit.docker_archive(kit.image(ONE, TWO, ONE), [ONE, TWO, ONE], ["saved:1", "quay.io/a/b:2"])
    )
    for path in (first, oci, packed):
        (image,) = await store.load(path)
        assert image.id == FIRST.config_digest and image.repo_tags == ("docker.io/library/first:1",)
        assert image.repo_digests == (f"docker.io/library/first@{FIRST.digest}",)
    (image,) = await store.load(docker)
    assert image.repo_tags == ("docker.io/library/saved:1", "quay.io/a/b:2") and image.repo_digests == ()
    assert [layer.name for layer in image.layers] == [kit.sha256(TWO), kit.sha256(ONE)]


async def test_layout_of_the_demo(state: Path, store: ImageStore) -> None:
    script = Path(__file__).parents[2] / "images" / "busybox.py"
    subprocess.run([sys.executable, script, state / "busybox"], check=True, capture_output=True)
    (image,) = await store.load(state / "busybox")
    assert len(image.repo_tags) == 1 and store.get(image.repo_tags[0]) == image
    (layer,) = store.lease(image.id, "me")
    listing = subprocess.run(
        ["unsquashfs", "-lls", layer.path], check=True, capture_output=True, text=True
    ).stdout
    assert "squashfs-root/bin/sh -> busybox" in listing


@pytest.mark.parametrize(
    "damage", ["nothing", "no json", "no layout", "missing blob", "wrong blob", "link out", "name"]
)
async def test_broken_archives(state: Path, store: ImageStore, damage: str) -> None:
    path, _ = layouts(state)
    blob = path / "blobs/sha256" / FIRST.config_digest.removeprefix("sha256:")
    if damage == "nothing":
        path = state / "absent"
    elif damage == "no json":
        (path / "index.json").write_text("{")
    elif damage == "no layout":
        (path / "index.json").unlink()
    elif damage == "missing blob":
        blob.unlink()
    elif damage == "wrong blob":
        blob.write_bytes(blob.read_bytes()[::-1])
    elif damage == "link out":
        blob.unlink()
        blob.symlink_to("/etc/shadow")
    else:
        path = kit.write_layout(state / "named", FIRST, "Bad Name")
    with pytest.raises(errors.NotFound if damage == "nothing" else errors.ImageError, match="load of"):
        await store.load(path)
    assert store.list() == []


async def test_archive_caps(state: Path) -> None:
    path = state / "many.tar"
    path.write_bytes(kit.tar(*(Item(str(n), b"x" * 1000) for n in range(20))))
    async with opened(state / "s", Limits(max_archive_members=10)) as store:
        with pytest.raises(errors.ResourceExhausted, match="10 entries"):
            await store.load(path)
    async with opened(state / "s", Limits(max_image=10_000)) as store:
        with pytest.raises(errors.ResourceExhausted, match="10000 bytes"):
            await store.load(path)


async def test_restart_keeps_images(state: Path) -> None:
    async with opened(state / "s") as store:
        for path in layouts(state):
            await store.load(path)
        before = store.list()
    async with opened(state / "s") as store:
        assert store.list() == before and len(before) == 2


async def test_remove_takes_all_tags_and_only_unshared_layers(state: Path, store: ImageStore) -> None:
    for path in layouts(state):
        await store.load(path)
    await store.remove("first:1")
    assert store.get(FIRST.config_digest) is None and store.get("quay.io/x/second:2") is not None
    assert layer_files(state / "s") == [kit.sha256(ONE).removeprefix("sha256:") + ".squashfs"]
    await store.remove("first:1")
    await store.remove("never-heard-of")
    await store.remove(SECOND.config_digest[7:20])
    assert store.list() == [] and layer_files(state / "s") == []


async def test_leased_layers_outlive_removal_and_restart(state: Path) -> None:
    first, _ = layouts(state)
    async with opened(state / "s") as store:
        (image,) = await store.load(first)
        store.lease(image.id, "container")
        await store.remove(image.id)
        assert store.list() == [] and len(layer_files(state / "s")) == 2
        with pytest.raises(errors.NotFound):
            store.lease(image.id, "another")
    async with opened(state / "s") as store:
        assert store.get(image.id) is None and len(layer_files(state / "s")) == 2
        files = store.lease(image.id, "container")
        await store.collect()
        assert [Path(file.path).stat().st_size for file in files] == [file.size for file in files]
        store.release("container")
        store.release("container")
        await settled(store)
        assert layer_files(state / "s") == []
    async with opened(state / "s") as store:
        with pytest.raises(errors.NotFound):
            store.lease(image.id, "container")


async def test_removed_images_without_leases_go_at_collect(state: Path) -> None:
    first, _ = layouts(state)
    async with opened(state / "s") as store:
        (image,) = await store.load(first)
        store.lease(image.id, "container")
        await store.remove(image.id)
    async with opened(state / "s") as store:
        await store.collect()
        assert layer_files(state / "s") == [] and not list((state / "s/images").iterdir())


async def test_damage_is_set_aside(state: Path) -> None:
    async with opened(state / "s") as store:
        for path in layouts(state):
            await store.load(path)
    name = FIRST.config_digest.removeprefix("sha256:") + ".json"
    (state / "s/images" / name).write_bytes(b'{"image": 1')
    (state / "s/layers/stray.squashfs").write_bytes(b"?")
    async with opened(state / "s") as store:
        assert [image.id for image in store.list()] == [SECOND.config_digest]
        assert (state / "s/unreadable/images" / name).exists()
        assert layer_files(state / "s") == [kit.sha256(ONE).removeprefix("sha256:") + ".squashfs"]
    (state / "s/layers" / layer_files(state / "s")[0]).write_bytes(b"hsqs, but short")
    async with opened(state / "s") as store:
        assert store.list() == []


async def test_layer_files_are_for_one_group_only(state: Path) -> None:
    first, _ = layouts(state)
    async with opened(state / "s", layer_gid=4711) as store:
        (image,) = await store.load(first)
        for file in store.lease(image.id, "x"):
            info = Path(file.path).stat()
            assert (info.st_mode & 0o777, info.st_uid, info.st_gid) == (0o440, 0, 4711)


async def test_fs_info(state: Path, store: ImageStore) -> None:
    empty = await store.fs_info()
    first, _ = layouts(state)
    await store.load(first)
    full = await store.fs_info()
    assert full.mountpoint == str(state / "s/layers")
    assert full.used_bytes > empty.used_bytes + 100_000 and full.inodes == empty.inodes + 3


async def test_closed_parent_is_named(state: Path) -> None:
    (state / "private").mkdir(mode=0o700)
    store = ImageStore(state / "private/s", state, ImageSettings())
    with pytest.raises(errors.FailedPrecondition, match=r"private.*chmod o\+x"):
        await store.open()
    await store.close()


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=711", "tmpfs", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


async def test_full_disk(state: Path) -> None:
    """The pull fails with the right code and leaves nothing; what fits afterwards works; removal works too."""
    big = kit.write_layout(state / "big", kit.image(kit.tar(Item("big", os.urandom(6 << 20)))), "big")
    _, small = layouts(state)
    with small_disk(state / "s", "3m"):
        async with opened(state / "s") as store:
            with pytest.raises(errors.ResourceExhausted, match="big"):
                await store.load(big)
            assert store.list() == [] and layer_files(state / "s") == []
            await store.load(small)
            filler = state / "s/filler"
            with contextlib.suppress(OSError):
                filler.write_bytes(bytes(4 << 20))
            with pytest.raises(errors.ResourceExhausted):
                await store.load(state / "first")
            await store.remove("quay.io/x/second:2")
            assert store.list() == [] and layer_files(state / "s") == []


def test_a_record_that_fits_only_in_part(state: Path) -> None:
    """The kernel takes what fits and says how much that was; only the next write fails."""
    with small_disk(state / "s", "64k"):
        record, filler = state / "s/record", state / "s/filler"
        write_atomic(record, b"old")
        with contextlib.suppress(OSError):
            filler.write_bytes(bytes(1 << 20))
        os.truncate(filler, filler.stat().st_size - 4096)
        with pytest.raises(errors.ResourceExhausted, match="no room for"):
            write_atomic(record, bytes(20_000))
        assert record.read_bytes() == b"old"
        assert sorted(path.name for path in record.parent.iterdir()) == ["filler", "record"]


async def test_pull_larger_than_the_disk_fetches_nothing(state: Path) -> None:
    with reg.running(state / "registry") as registry, small_disk(state / "s", "3m"):
        registry.push("a", "1", kit.image(kit.tar(Item("big", os.urandom(6 << 20)))))
        async with opened(state / "s") as store:
            with pytest.raises(errors.ResourceExhausted, match=r"needs \d+ bytes below"):
                await store.pull(f"{registry.address}/a:1")


KILLED = """
import asyncio, sys
from pathlib import Path
from hyperpod.image.settings import ImageSettings
from hyperpod.image.store import ImageStore
from hyperpod.store.records import write_atomic
async def main():
    store = ImageStore(Path(sys.argv[1]), Path(sys.argv[1]), ImageSettings())
    await store.open()
    await store.pull(sys.argv[2])
    print("pulled", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


async def killed_at(state: Path, glob: str, ref: str) -> bool:
    """Whether a path of this form showed before the image was there."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, state, ref], stdout=subprocess.DEVNULL)
    try:
        while not (found := list(state.glob(glob))) and not list(state.glob("images/*.json")):
            assert process.poll() is None
            await asyncio.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return bool(found)


@pytest.mark.parametrize(
    "glob", ["staging/pull-*/blobs", "staging/pull-*/layers-*", "layers/*", "images/*.json"]
)
async def test_kill_nine_leaves_nothing_half_made(state: Path, glob: str) -> None:
    """The process is killed when the first path of this form shows; a new one starts clean and pulls."""
    with reg.running(state / "registry") as registry:
        registry.push("a", "1", FIRST)
        ref = f"{registry.address}/a:1"
        async with asyncio.timeout(120):
            while not await killed_at(state / "s", glob, ref):  # we were away while it was there
                shutil.rmtree(state / "s")
        async with opened(state / "s") as store:
            known = store.list()
            wanted = {layer.file for image in known for layer in image.layers}
            assert set(layer_files(state / "s")) == wanted
            assert not list((state / "s/staging").iterdir())
            image = await store.pull(ref)
            assert image.id == FIRST.config_digest and known in ([], [image])
