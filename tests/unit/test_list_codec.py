"""The kept bytes of list items: always what encoding the whole reply would give."""

from __future__ import annotations

import asyncio

from betterproto2 import Message
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.cri import codec, replies
from hyperpod.cri.codec import ListCodec
from hyperpod.model.container import Container, ContainerConfig, ContainerMetadata, ContainerRecord
from hyperpod.model.container import ContainerStatus as Status
from hyperpod.model.images import ImageConfig
from hyperpod.model.sandbox import (
    Artifact,
    Sandbox,
    SandboxConfig,
    SandboxMetadata,
    SandboxPhase,
    SandboxRecord,
    SandboxStatus,
    VmSize,
)

TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
WORDS = st.one_of(TEXT, st.just("x" * 300), st.just("y" * 20_000))
LABELS = st.dictionaries(st.sampled_from(["app", "tier", "", "é"]) | TEXT, WORDS, max_size=4)
TIMES = st.integers(0, 2**63 - 1)
IDS = st.text("0123456789abcdef", min_size=64, max_size=64)
STATUSES = st.builds(Status, started_at=st.sampled_from([0, 5]), finished_at=st.sampled_from([0, 6]))


def _container(
    ident: str, sandbox_id: str, name: str, image: str, created_at: int, labels: dict[str, str],
    annotations: dict[str, str], attempt: int, status: Status,
) -> Container:  # fmt: skip
    config = ContainerConfig(
        metadata=ContainerMetadata(name=name, attempt=attempt), image=image, labels=labels,
        annotations=annotations, image_annotations=labels, user_specified_image=name,
    )  # fmt: skip
    record = ContainerRecord(
        id=ident, sandbox_id=sandbox_id, config=config, image_id=image, image_ref=image,
        created_at=created_at, log_path="/l", layers=(), stop_signal="", image_config=ImageConfig(),
    )  # fmt: skip
    return Container(record=record, status=status)


def _sandbox(
    ident: str, name: str, created_at: int, labels: dict[str, str], annotations: dict[str, str],
    attempt: int, phase: SandboxPhase,
) -> Sandbox:  # fmt: skip
    config = SandboxConfig(
        metadata=SandboxMetadata(name=name, uid=name, namespace="n", attempt=attempt),
        labels=labels, annotations=annotations,
    )  # fmt: skip
    record = SandboxRecord(
        id=ident, config=config, runtime_handler=name, created_at=created_at, host_boot_id="b", slot=0, uid=1,
        gid=1, cid=9, token=b"t", domain="d", domain_uuid="u", kernel=Artifact(version="1", path="/k"),
        guest=Artifact(version="1", path="/g"),
        size=VmSize(memory_mib=1, vcpus=1, max_memory_mib=1, max_vcpus=1),
    )  # fmt: skip
    return Sandbox(record=record, status=SandboxStatus(phase=phase))


CONTAINERS = st.lists(
    st.builds(
        _container, ident=IDS, sandbox_id=IDS, name=WORDS, image=TEXT, created_at=TIMES, labels=LABELS,
        annotations=LABELS, attempt=st.integers(0, 2**32 - 1), status=STATUSES,
    ),
    max_size=8, unique_by=lambda one: one.id,
)  # fmt: skip
SANDBOXES = st.lists(
    st.builds(
        _sandbox, ident=IDS, name=WORDS, created_at=TIMES, labels=LABELS, annotations=LABELS,
        attempt=st.integers(0, 2**32 - 1), phase=st.sampled_from(list(SandboxPhase)),
    ),
    max_size=8, unique_by=lambda one: one.id,
)  # fmt: skip
CONTAINER_FILTERS = st.none() | st.builds(
    cri.ContainerFilter,
    id=st.just("") | st.text("0123456789abcdef", max_size=2),
    state=st.none() | st.builds(cri.ContainerStateValue, state=st.sampled_from(list(cri.ContainerState))),
    label_selector=st.just({}) | LABELS,
)
POD_FILTERS = st.none() | st.builds(
    cri.PodSandboxFilter,
    id=st.just("") | st.text("0123456789abcdef", max_size=2),
    state=st.none() | st.builds(cri.PodSandboxStateValue, state=st.sampled_from(list(cri.PodSandboxState))),
)


@given(CONTAINERS, st.lists(CONTAINER_FILTERS, min_size=1, max_size=4), st.data())
def test_container_lists_are_what_encoding_them_whole_gives(
    items: list[Container], filters: list[cri.ContainerFilter | None], data: st.DataObject
) -> None:
    kept = ListCodec(replies.container)
    for wanted in filters:
        chosen = replies.wanted_containers(items, wanted)
        whole = cri.ListContainersResponse(containers=[replies.container(one) for one in chosen])
        assert bytes(kept.reply(chosen, items)) == bytes(whole)
        pages = kept.pages(chosen, items)
        streamed = cri.StreamContainersResponse(containers=whole.containers)
        assert b"".join(map(bytes, pages)) == bytes(streamed)
        # Something changes between two lists: one gets another status, one goes.
        if items:
            at = data.draw(st.integers(0, len(items) - 1))
            items[at] = Container(record=items[at].record, status=data.draw(STATUSES))
            items = items[: data.draw(st.integers(0, len(items)))] if data.draw(st.booleans()) else items


@given(SANDBOXES, st.lists(POD_FILTERS, min_size=1, max_size=4))
def test_pod_lists_are_what_encoding_them_whole_gives(
    items: list[Sandbox], filters: list[cri.PodSandboxFilter | None]
) -> None:
    kept = ListCodec(replies.pod)
    for wanted in filters:
        chosen = replies.wanted_pods(items, wanted)
        messages = [replies.pod(one) for one in chosen]
        assert bytes(kept.reply(chosen, items)) == bytes(cri.ListPodSandboxResponse(items=messages))
        pages = kept.pages(chosen, items)
        assert b"".join(map(bytes, pages)) == bytes(cri.StreamPodSandboxesResponse(pod_sandboxes=messages))


class Counted:
    """Counts how often an item is made anew."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, one: Container) -> Message:
        self.made.append(one.id[:2])
        return replies.container(one)


def some(count: int) -> list[Container]:
    return [
        _container(f"{n:02x}" * 32, "a" * 64, f"c{n}", "image", n, {}, {}, 0, Status()) for n in range(count)
    ]


def test_an_item_is_encoded_once_per_change() -> None:
    counted, items = Counted(), some(3)
    kept = ListCodec(counted)
    for _ in range(3):
        kept.reply(items, items)
        # What the manager makes at every look: other views of the same record and status.
        items = [one.model_copy() for one in items]
    assert counted.made == ["00", "01", "02"]
    items[1] = Container(record=items[1].record, status=items[1].status.next(started_at=7))
    reply = cri.ListContainersResponse.parse(bytes(kept.reply(items, items)))
    assert counted.made == ["00", "01", "02", "01"]
    assert reply.containers[1].state == cri.ContainerState.CONTAINER_RUNNING


def test_a_status_taken_back_is_noticed_although_its_version_comes_again() -> None:
    kept, [one] = ListCodec(replies.container), some(1)
    running = Container(record=one.record, status=one.status.next(started_at=7))
    exited = Container(record=one.record, status=one.status.next(finished_at=8))
    assert running.status.version == exited.status.version
    for view in (running, exited):
        whole = cri.ListContainersResponse(containers=[replies.container(view)])
        assert bytes(kept.reply([view], [view])) == bytes(whole)


def test_what_is_gone_is_forgotten() -> None:
    kept, items = ListCodec(replies.container), some(100)
    kept.reply(items, items)
    assert len(kept) == 100
    kept.reply(items[:1], items[:5])
    assert len(kept) == 5
    assert bytes(kept.reply([], [])) == b""
    assert len(kept) == 0


async def test_warming_encodes_all_in_turns() -> None:
    counted, items, turns = Counted(), some(codec.BATCH * 2 + 1), 0
    kept = ListCodec(counted)
    warming = asyncio.ensure_future(kept.warm(items))
    while not warming.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 2
    assert len(kept) == len(items)
    kept.reply(items, items)
    await kept.warm(items)
    assert len(counted.made) == len(items)


def test_pages_are_bounded() -> None:
    kept, items = ListCodec(replies.container), some(codec.PAGE // 2)
    assert kept.pages([], []) == []
    pages = kept.pages([*items, *items, *items], items)
    sizes = [len(cri.StreamContainersResponse.parse(bytes(page)).containers) for page in pages]
    assert sizes == [codec.PAGE, codec.PAGE // 2]
