"""Pulls from a real registry by the real skopeo."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hyperpod import errors
from hyperpod.image.settings import Limits
from hyperpod.image.store import ImageStore
from hyperpod.model.images import RegistryAuth
from tests import imagekit as kit
from tests import registry as reg
from tests.component.imagestore import layer_files, opened, passable_folder
from tests.imagekit import Item

ONE, TWO = kit.tar(Item("one", b"1")), kit.tar(Item("two", os.urandom(300_000)))
IMAGE = kit.image(ONE, TWO, config={"Cmd": ["/one"]})


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[reg.Registry]:
    with reg.running(tmp_path_factory.mktemp("registry")) as running:
        running.push("library/app", "latest", IMAGE)
        yield running


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[reg.Registry]:
    with reg.running(tmp_path_factory.mktemp("closed"), auth=True) as running:
        running.push("team/app", "v1", IMAGE)
        yield running


@pytest.fixture
def state() -> Iterator[Path]:
    with passable_folder() as path:
        yield path


@pytest.fixture
async def store(state: Path) -> AsyncIterator[ImageStore]:
    async with opened(state) as opened_store:
        yield opened_store


async def test_pull_by_tag_and_all_names(registry: reg.Registry, store: ImageStore) -> None:
    name = f"{registry.address}/library/app"
    image = await store.pull(name)
    assert image.id == IMAGE.config_digest
    assert image.repo_tags == (f"{name}:latest",)
    assert image.repo_digests == (f"{name}@{IMAGE.digest}",)
    assert image.config.cmd == ("/one",)
    assert [layer.name for layer in image.layers] == [kit.sha256(ONE), kit.sha256(TWO)]
    hex_id = image.id.removeprefix("sha256:")
    for text in (
        name,
        f"{name}:latest",
        f"{name}@{IMAGE.digest}",
        image.id,
        hex_id,
        hex_id[:12],
        image.id[:20],
    ):
        assert store.get(text) == image, text
    assert store.get("app") is None and store.get(f"{name}:other") is None and store.get("!!") is None


async def test_pull_by_digest(registry: reg.Registry, store: ImageStore) -> None:
    name = f"{registry.address}/library/app"
    image = await store.pull(f"{name}:ignored@{IMAGE.digest}")
    assert image.repo_tags == () and image.repo_digests == (f"{name}@{IMAGE.digest}",)


async def test_catch_all_mirror(registry: reg.Registry, state: Path) -> None:
    async with opened(state, mirror=registry.address) as store:
        image = await store.pull("app")
        assert image.repo_tags == ("docker.io/library/app:latest",)
        assert store.get("app") == image == store.get("docker.io/library/app")


async def test_index_gives_this_platform_and_its_own_digest(
    registry: reg.Registry, store: ImageStore
) -> None:
    other = kit.image(ONE, change_config={"architecture": "arm64"})
    both = kit.index((other, "linux/arm64"), (IMAGE, "linux/amd64"))
    registry.push("library/multi", "1", both, (other, IMAGE))
    name = f"{registry.address}/library/multi"
    image = await store.pull(f"{name}:1")
    assert image.id == IMAGE.config_digest and image.repo_digests == (f"{name}@{both.digest}",)
    with pytest.raises(errors.ImageError, match="linux/arm64, this node runs linux/amd64"):
        await store.pull(f"{name}@{other.digest}")


async def test_schema_2_keeps_its_digests(registry: reg.Registry, store: ImageStore) -> None:
    old = kit.image(ONE, TWO, schema2=True)
    registry.push("library/old", "1", old)
    image = await store.pull(f"{registry.address}/library/old:1")
    assert image.id == old.config_digest
    assert image.repo_digests == (f"{registry.address}/library/old@{old.digest}",)


async def test_moved_tag_leaves_the_old_image_untagged(registry: reg.Registry, store: ImageStore) -> None:
    name = f"{registry.address}/library/moving"
    registry.push("library/moving", "1", kit.image(ONE))
    old = await store.pull(f"{name}:1")
    registry.push("library/moving", "1", kit.image(TWO))
    new = await store.pull(f"{name}:1")
    assert old.id != new.id and store.get(f"{name}:1") == new
    left = store.get(old.id)
    assert left is not None and left.repo_tags == () and left.repo_digests == old.repo_digests


async def test_two_names_of_one_image_share_its_record(registry: reg.Registry, store: ImageStore) -> None:
    registry.push("library/twin", "a", IMAGE)
    first = await store.pull(f"{registry.address}/library/app")
    second = await store.pull(f"{registry.address}/library/twin:a")
    assert first.id == second.id and len(store.list()) == 1
    assert set(second.repo_tags) == {
        f"{registry.address}/library/app:latest",
        f"{registry.address}/library/twin:a",
    }


async def test_equal_pulls_share_the_work(
    registry: reg.Registry, store: ImageStore, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    name = f"{registry.address}/library/app"
    images = await asyncio.gather(*(store.pull(name) for _ in range(5)))
    assert len({image.id for image in images}) == 1
    assert sum("layers," in r.message and "bytes" in r.message for r in caplog.records) == 1
    assert sum(": built," in r.message for r in caplog.records) == 2
    registry.push("library/again", "1", IMAGE)
    await store.pull(f"{registry.address}/library/again:1")
    assert sum("here already, verified" in r.message for r in caplog.records) == 2, (
        "layers that are here are not built again"
    )


async def test_an_image_that_is_here_is_not_fetched_again(
    closed: reg.Registry, store: ImageStore, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As for each start with imagePullPolicy Always: the registry says which image it is and who may have it."""
    caplog.set_level(logging.INFO)
    auth = RegistryAuth(username=reg.USER, password=reg.PASSWORD)
    closed.push("team/often", "1", IMAGE)
    closed.push("team/often", "2", IMAGE)
    closed.push("team/other", "1", IMAGE)

    async def fetched(name: str) -> bool:
        caplog.clear()
        image = await store.pull(f"{closed.address}/team/{name}", auth)
        assert image.id == IMAGE.config_digest and store.get(f"{closed.address}/team/{name}") == image
        return "layers," in caplog.text

    assert await fetched("often:1")
    assert not await fetched("often:1")
    assert not await fetched("often:2")
    assert not await fetched(f"often@{IMAGE.digest}")
    assert await fetched("other:1"), "who may read one repository need not have the layers of another"
    with pytest.raises(errors.PermissionDenied):
        await store.pull(f"{closed.address}/team/often:1")
    file = state / "layers" / layer_files(state)[0]
    file.unlink()
    assert await fetched("often:1"), "the damaged one is mended"
    assert file.exists()
    await store.remove(IMAGE.config_digest)
    assert await fetched("often:1")


async def test_caller_that_leaves_does_not_end_a_pull(registry: reg.Registry, store: ImageStore) -> None:
    name = f"{registry.address}/library/app"
    caller = asyncio.ensure_future(store.pull(name))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert (await store.pull(name)).id == IMAGE.config_digest


@pytest.mark.parametrize(
    ("path", "kind"),
    [("library/app:none", errors.NotFound), ("library/none", errors.NotFound)],
)
async def test_not_found(registry: reg.Registry, store: ImageStore, path: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=path):
        await store.pull(f"{registry.address}/{path}")


async def test_unreachable(store: ImageStore) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(errors.Unavailable, match="refused"):
            await store.pull(f"{address}/library/app")


async def test_silent_registry_is_given_up(state: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        async with opened(state, stall_timeout=1.0) as store:
            with pytest.raises(errors.DeadlineExceeded, match="resolving: no progress for 1 s"):
                await store.pull(f"127.0.0.1:{silent.getsockname()[1]}/library/app")


@contextlib.asynccontextmanager
async def stuck_after(registry: reg.Registry, budget: int) -> AsyncIterator[str]:
    """Address of a relay to the registry that stops after so many bytes in all, connections left open."""
    host, _, port = registry.address.partition(":")
    tasks: set[asyncio.Task[None]] = set()

    async def relay(source: asyncio.StreamReader, sink: asyncio.StreamWriter, counted: bool) -> None:
        nonlocal budget
        while piece := await source.read(4096):
            budget -= len(piece) if counted else 0
            if budget < 0:
                await asyncio.Event().wait()
            sink.write(piece)
            await sink.drain()
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(host, int(port))
        pair = [asyncio.ensure_future(relay(reader, up_writer, False))]
        pair.append(asyncio.ensure_future(relay(up_reader, writer, True)))
        tasks.update(pair)
        try:
            await asyncio.wait(pair, return_when=asyncio.FIRST_COMPLETED)
        finally:
            up_writer.close()
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


async def test_stalled_copy_is_given_up_and_told(
    registry: reg.Registry, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with (
        stuck_after(registry, 200_000) as address,
        opened(state, stall_timeout=8.0, progress_interval=0.5, mirror=address) as store,
    ):
        with pytest.raises(
            errors.DeadlineExceeded, match=r"library/app:latest: copying: no progress for 8 s"
        ):
            await store.pull("app")
    told = [int(m[1]) for r in caplog.records if (m := re.search(r"copying: (\d+) of 300", r.message))]
    assert told and max(told) > 100_000
    assert layer_files(state) == []


async def test_credentials(closed: reg.Registry, store: ImageStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    name = f"{closed.address}/team/app:v1"
    wrong = RegistryAuth(username=reg.USER, password="wrong")
    elsewhere = RegistryAuth(username=reg.USER, password=reg.PASSWORD, server_address="other.example")
    for auth in (None, wrong, elsewhere):
        with pytest.raises(errors.PermissionDenied):
            await store.pull(name, auth)
    right = RegistryAuth(username=reg.USER, password=reg.PASSWORD)
    assert (await store.pull(name, right)).id == IMAGE.config_digest
    pair = base64.b64encode(f"{reg.USER}:{reg.PASSWORD}".encode()).decode()
    assert (await store.pull(name, RegistryAuth(auth=pair))).id == IMAGE.config_digest
    with pytest.raises(errors.PermissionDenied):
        await store.pull(name)  # that the image is here gives nobody the right to it
    assert reg.PASSWORD not in caplog.text and pair not in caplog.text


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[reg.Registry, reg.Issuer]]:
    folder = tmp_path_factory.mktemp("tokens")
    issuer = reg.Issuer(folder)
    with issuer.serving(), reg.running(folder / "registry", issuer=issuer) as running:
        running.push("team/app", "v1", IMAGE)
        yield running, issuer


async def test_registry_token(
    tokens: tuple[reg.Registry, reg.Issuer], store: ImageStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    registry, issuer = tokens
    name = f"{registry.address}/team/app:v1"
    token = issuer.token("team/app")
    other = RegistryAuth(registry_token=issuer.token("team/other"))
    for auth in (None, other, RegistryAuth(registry_token="nonsense")):
        with pytest.raises(errors.PermissionDenied):
            await store.pull(name, auth)
    image = await store.pull(name, RegistryAuth(registry_token=token))
    assert image.id == IMAGE.config_digest and image.repo_tags == (name,)
    assert token not in caplog.text
    with pytest.raises(errors.NotFound):
        await store.pull(f"{registry.address}/team/app:none", RegistryAuth(registry_token=token))
    with pytest.raises(errors.InvalidArgument):
        await store.pull(name, RegistryAuth(registry_token="a\r\nHost: evil"))


async def test_identity_token(tokens: tuple[reg.Registry, reg.Issuer], store: ImageStore) -> None:
    name = f"{tokens[0].address}/team/app:v1"
    with pytest.raises(errors.PermissionDenied):
        await store.pull(name, RegistryAuth(identity_token="wrong"))
    assert (await store.pull(name, RegistryAuth(identity_token=reg.IDENTITY))).id == IMAGE.config_digest


async def test_credentials_are_in_no_command_line(
    closed: reg.Registry, store: ImageStore, state: Path
) -> None:
    auth = RegistryAuth(username=reg.USER, password=reg.PASSWORD)
    secret = base64.b64encode(f"{reg.USER}:{reg.PASSWORD}".encode())
    pull = asyncio.ensure_future(store.pull(f"{closed.address}/team/app:v1", auth))
    seen, modes = b"", set()
    while not pull.done():
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = entry.read_bytes()
                owned = (entry.parent / "cwd").readlink().is_relative_to(state)
            except OSError:
                continue
            seen += line if owned else b""
        with contextlib.suppress(OSError):
            modes |= {oct(p.stat().st_mode & 0o777) for p in state.glob("staging/*/auth.json")}
        await asyncio.sleep(0)
    await pull
    assert b"skopeo" in seen and reg.PASSWORD.encode() not in seen and secret not in seen
    assert modes == {"0o600"}


async def test_the_unprivileged_user_cannot_swap_what_root_gives_it(
    registry: reg.Registry, store: ImageStore, state: Path
) -> None:
    """What a hostile image left running as that user must not get other files given to it in their place."""
    pull = asyncio.ensure_future(store.pull(f"{registry.address}/library/app"))
    owners: dict[str, set[int]] = {}
    while not pull.done():
        for pattern in ("staging/*", "staging/*/*", "staging/*/layers-*/*"):
            with contextlib.suppress(OSError):  # what the pull takes away meanwhile ends the search, too
                for path in state.glob(pattern):
                    name = path.name.partition("-")[0]
                    owners.setdefault(name, set()).add(path.parent.stat().st_uid)
        await asyncio.sleep(0)
    await pull
    assert owners.keys() >= {"pull", "layers", "0", "1", "blobs", "tmp", "auth.json"}
    assert set().union(*owners.values()) == {0}, owners


async def test_blob_that_is_not_what_its_digest_says(
    registry: reg.Registry, store: ImageStore, state: Path
) -> None:
    built = kit.image(kit.tar(Item("own", b"own contents")))
    registry.push("library/damaged", "1", built)
    layer = json.loads(built.top)["layers"][0]["digest"]
    file = registry.blob_file(layer)
    file.write_bytes(
        kit.pack(kit.tar(Item("evil", b"own contents")))[: file.stat().st_size].ljust(file.stat().st_size)
    )
    with pytest.raises(errors.ImageError, match=r"[Dd]igest"):
        await store.pull(f"{registry.address}/library/damaged:1")
    assert store.list() == [] and layer_files(state) == []


async def test_claimed_diff_id_of_another_tenants_layer(
    registry: reg.Registry, store: ImageStore, state: Path
) -> None:
    """Neither does the claim give its author the other's layer, nor does his own land under that name."""
    await store.pull(f"{registry.address}/library/app")
    before = {name: (state / "layers" / name).read_bytes() for name in layer_files(state)}
    thief = kit.image(kit.tar(Item("mine")), diff_ids=[kit.sha256(TWO)])
    registry.push("library/thief", "1", thief)
    with pytest.raises(errors.ImageError, match="diff id is"):
        await store.pull(f"{registry.address}/library/thief:1")
    assert {name: (state / "layers" / name).read_bytes() for name in layer_files(state)} == before


async def test_declared_sizes_over_the_cap_fetch_nothing(registry: reg.Registry, state: Path) -> None:
    async with opened(state, Limits(max_blob=100_000)) as store:
        with pytest.raises(errors.ResourceExhausted, match=r"layer sha256:.* the cap is 100000"):
            await store.pull(f"{registry.address}/library/app")


async def test_pull_limit(registry: reg.Registry, state: Path) -> None:
    """With one slot a second image waits; both come."""
    registry.push("library/second", "1", kit.image(ONE))
    async with opened(state, max_concurrent_pulls=1) as store:
        pulls = [
            asyncio.ensure_future(store.pull(f"{registry.address}/library/{n}")) for n in ("app", "second:1")
        ]
        most = 0
        while not all(pull.done() for pull in pulls):
            most = max(most, len(list((state / "staging").glob("pull-*"))))
            await asyncio.sleep(0.01)
        assert len({(await pull).id for pull in pulls}) == 2
        assert most == 1
