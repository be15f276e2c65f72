"""Virtqueues over plain memory: order, notification, and whatever a hostile driver writes."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperpod.errors import ProtocolError
from hyperpod.wire.vsock.memory import GuestMemory, Region
from hyperpod.wire.vsock.virtqueue import RingLayout, Virtqueue

GUEST, USER, LENGTH = 0x1000, 0x7000_0000, 0x4000
SIZE = 8
LAYOUT = RingLayout(SIZE, USER, USER + 0x1000, USER + 0x2000)
BUFFERS = 0x3000


class Driver:
    def __init__(self, *, event_index: bool = True, writable: bool = False, base: int = 0) -> None:
        self.raw = bytearray(LENGTH)
        self.available = memoryview(self.raw)[0x1000 : 0x1000 + 6 + 2 * SIZE].cast("H")
        self.used = memoryview(self.raw)[0x2000 : 0x2000 + 6 + 8 * SIZE].cast("H")
        self.available[1] = self.used[1] = base
        self.memory = GuestMemory([Region(GUEST, USER, memoryview(self.raw))])
        self.queue = Virtqueue(
            self.memory, LAYOUT, writable=writable, event_index=event_index, indirect=True, base=base
        )

    def descriptor(self, index: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        struct.pack_into("<QIHH", self.raw, 16 * index, address, length, flags, following)

    def offer(self, *heads: int) -> None:
        for head in heads:
            self.available[2 + self.available[1] % SIZE] = head
            self.available[1] = (self.available[1] + 1) & 0xFFFF


@given(st.integers(0, 0xFFFF), st.lists(st.integers(1, SIZE), max_size=20))
def test_everything_offered_comes_back_in_order(base: int, rounds: list[int]) -> None:
    driver = Driver(base=base)
    for i in range(SIZE):
        driver.descriptor(i, GUEST + BUFFERS + 16 * i, 1 + i)
    for count in rounds:
        driver.offer(*range(count))
        for head in range(count):
            chain = driver.queue.pop()
            assert chain is not None
            assert (chain.head, [len(piece) for piece in chain.pieces]) == (head, [1 + head])
            driver.queue.push(chain.head, 7)
        assert driver.queue.pop() is None
        driver.queue.flush()
        assert driver.used[1] == driver.available[1] == driver.queue.next_index


def test_a_successor_continues_at_the_used_index() -> None:
    driver = Driver()
    driver.descriptor(0, GUEST + BUFFERS, 4)
    driver.offer(0, 0, 0)
    for _ in range(2):
        chain = driver.queue.pop()
        assert chain is not None
        driver.queue.push(chain.head, 0)
        driver.queue.flush()
    driver.queue.pop()  # taken, and never published
    heir = Virtqueue(driver.memory, LAYOUT, writable=False, event_index=True, indirect=True, base=None)
    assert heir.next_index == 2
    assert heir.pop() is not None
    assert heir.pop() is None


def test_rewound_chains_come_again() -> None:
    driver = Driver()
    driver.descriptor(3, GUEST + BUFFERS, 4)
    driver.offer(3, 3)
    assert [driver.queue.pop() is not None for _ in range(3)] == [True, True, False]
    driver.queue.rewind(2)
    assert [driver.queue.pop() is not None for _ in range(3)] == [True, True, False]


def test_chains_and_indirect_tables_are_followed() -> None:
    driver = Driver()
    driver.descriptor(0, GUEST + BUFFERS, 4, 1, 5)
    driver.descriptor(5, GUEST + BUFFERS + 0x100, 32, 4)
    struct.pack_into("<QIHH", driver.raw, BUFFERS + 0x100, GUEST + BUFFERS, 5, 1, 1)
    struct.pack_into("<QIHH", driver.raw, BUFFERS + 0x110, GUEST + BUFFERS, 6, 0, 0)
    driver.offer(0)
    chain = driver.queue.pop()
    assert chain is not None
    assert [len(piece) for piece in chain.pieces] == [4, 5, 6]


@given(st.integers(0, 0xFFFF), st.integers(1, SIZE), st.integers(0, SIZE))
def test_interrupts_follow_the_used_event(base: int, count: int, event: int) -> None:
    """An interrupt exactly when the entry that the driver waits for is among those just published."""
    driver = Driver(base=base)
    driver.descriptor(0, GUEST + BUFFERS, 4)
    driver.available[2 + SIZE] = (base + event) & 0xFFFF
    driver.offer(*[0] * count)
    for _ in range(count):
        driver.queue.push(0, 0)
    assert driver.queue.flush() == (event < count)
    assert not driver.queue.flush()


def test_without_event_index_flags_rule() -> None:
    driver = Driver(event_index=False)
    driver.queue.disable_kicks()
    assert driver.used[0] == 1
    assert not driver.queue.enable_kicks()
    assert driver.used[0] == 0
    driver.offer(0)
    assert driver.queue.enable_kicks()
    driver.queue.push(0, 0)
    assert driver.queue.flush()
    driver.available[0] = 1
    driver.queue.push(0, 0)
    assert not driver.queue.flush()


def test_kicks_are_asked_for_at_the_next_entry() -> None:
    driver = Driver(base=0xFFFF)
    driver.offer(0)
    driver.queue.pop()
    assert not driver.queue.enable_kicks()
    assert driver.used[2 + 4 * SIZE] == 0


@pytest.mark.parametrize(
    "layout",
    [
        RingLayout(0, USER, USER + 0x1000, USER + 0x2000),
        RingLayout(6, USER, USER + 0x1000, USER + 0x2000),
        RingLayout(8, USER + 1, USER + 0x1000, USER + 0x2000),
        RingLayout(8, USER, USER + 0x1001, USER + 0x2000),
        RingLayout(8, USER, USER + 0x1000, USER + 0x2002),
        RingLayout(8, 0, USER + 0x1000, USER + 0x2000),
        RingLayout(8, USER, USER + LENGTH - 2, USER + 0x2000),
        RingLayout(8, USER, USER + 0x1000, (1 << 64) - 4),
    ],
)
def test_impossible_rings_are_refused(layout: RingLayout) -> None:
    with pytest.raises(ProtocolError):
        Virtqueue(Driver().memory, layout, writable=False, event_index=True, indirect=True, base=0)


@pytest.mark.parametrize(("size", "taken"), [(128, True), (1024, True), (2048, False)])
def test_the_rings_of_qemu_are_taken(size: int, taken: bool) -> None:
    """128 entries with QEMU 7.2, 1024 with 10.0."""
    memory = GuestMemory([Region(GUEST, USER, memoryview(bytearray(0x10000)))])
    layout = RingLayout(size, USER, USER + 0x8000, USER + 0xA000)
    with contextlib.nullcontext() if taken else pytest.raises(ProtocolError, match="ring size 2048"):
        queue = Virtqueue(memory, layout, writable=False, event_index=True, indirect=True, base=0)
        assert queue.pop() is None


ADDRESSES = st.one_of(st.integers(GUEST - 64, GUEST + LENGTH + 64), st.integers(0, 2**64 - 1))
DESCRIPTORS = st.tuples(
    ADDRESSES,
    st.one_of(st.integers(0, 200), st.integers(0, 2**32 - 1)),
    st.integers(0, 7),
    st.integers(0, SIZE + 1),
)


@given(
    st.lists(DESCRIPTORS, min_size=SIZE, max_size=SIZE),
    st.lists(DESCRIPTORS, min_size=SIZE, max_size=SIZE),
    st.lists(st.integers(0, SIZE), min_size=SIZE, max_size=SIZE),
    st.integers(0, SIZE + 1),
    st.booleans(),
)
def test_hostile_rings_give_memory_of_the_guest_or_a_protocol_error(
    table: list[tuple[int, int, int, int]],
    indirect: list[tuple[int, int, int, int]],
    heads: list[int],
    offered: int,
    writable: bool,
) -> None:
    driver = Driver(writable=writable)
    for i in range(SIZE):
        driver.descriptor(i, *table[i])
        struct.pack_into("<QIHH", driver.raw, BUFFERS + 16 * i, *indirect[i])
        driver.available[2 + i] = heads[i]
    driver.available[1] = offered
    try:
        for _ in range(SIZE + 1):
            chain = driver.queue.pop()
            if chain is None:
                break
            assert len(chain.pieces) <= SIZE + 1
            assert all(0 < len(piece) <= LENGTH for piece in chain.pieces)
            driver.queue.push(chain.head, 0)
    except ProtocolError:
        pass
    driver.queue.flush()
