"""The compiled encoder against betterproto2's own; the strict reader against the wire format's rules."""

from __future__ import annotations

import dataclasses
import random
import struct
from typing import Any, TypeVar

import betterproto2
import pytest
from betterproto2 import Message

from hyperpod.api.gen.hyperpod.agent import v1 as agent
from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.errors import InvalidArgument, ResourceExhausted
from hyperpod.rpc import strict
from hyperpod.rpc.encode import encode

MESSAGES = [
    kind
    for module in (cri, agent)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
]
M = TypeVar("M", bound=Message)
_INTS = (0, 1, 127, 128, 300, 2**31 - 1)
_LONGS = (*_INTS, 2**31, 2**53 + 1, 2**63 - 1)


def _value(rng: random.Random, kind: type[Any], proto_type: str, depth: int) -> Any:
    if proto_type == betterproto2.TYPE_MESSAGE:
        return sample(rng, kind, depth + 1)
    if proto_type == betterproto2.TYPE_STRING:
        return rng.choice(["", "a", "\u2603" * rng.randrange(50), "x" * rng.randrange(300)])
    if proto_type == betterproto2.TYPE_BYTES:
        return rng.randbytes(rng.randrange(200))
    if proto_type == betterproto2.TYPE_BOOL:
        return rng.random() < 0.5
    if proto_type == betterproto2.TYPE_ENUM:
        return kind(rng.choice([0, 1, 2, 77]))
    if proto_type in (betterproto2.TYPE_DOUBLE, betterproto2.TYPE_FLOAT):
        return rng.choice([0.0, -1.5, float("inf")])
    signed = proto_type in (betterproto2.TYPE_INT32, betterproto2.TYPE_INT64)
    ints = _LONGS if proto_type in (betterproto2.TYPE_INT64, betterproto2.TYPE_UINT64) else _INTS
    return rng.choice(ints) * (rng.choice((1, -1)) if signed else 1)


def sample(rng: random.Random, kind: type[M], depth: int = 0) -> M:
    """A message with about half of its fields set."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]  # every message is a dataclass
        meta = betterproto2.FieldMetadata.get(field)
        if rng.random() < 0.4 or depth > 5:
            continue
        if meta.map_meta is not None:
            kinds = [kind._cls_for(field, index=index) for index in (0, 1)]
            make = [
                lambda k=k, m=m: _value(rng, k, m.proto_type, depth)
                for k, m in zip(kinds, meta.map_meta, strict=True)
            ]
            values[field.name] = {make[0](): make[1]() for _ in range(rng.randrange(4))}
            continue
        inner = kind._cls_for(field)
        if meta.repeated:
            values[field.name] = [_value(rng, inner, meta.proto_type, depth) for _ in range(rng.randrange(4))]
        else:
            values[field.name] = _value(rng, inner, meta.proto_type, depth)
    return kind(**values)


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_the_bytes_are_betterproto2s_and_pass_the_strict_reader(kind: type[Message]) -> None:
    rng = random.Random(kind.__name__)
    for _ in range(8):
        message = sample(rng, kind)
        raw = encode(message)
        assert raw == bytes(message)
        strict.check(raw, kind)
        assert encode(kind.parse(raw)) == raw


def test_there_are_all_messages() -> None:
    assert len(MESSAGES) > 190


def test_unknown_fields_are_handed_on() -> None:
    raw = bytes(cri.VersionResponse(version="1")) + b"\xa2\x06\x01x"  # field 100
    strict.check(raw, cri.VersionResponse)
    assert encode(cri.VersionResponse.parse(raw)) == raw


def test_present_and_zero_is_not_absent() -> None:
    user = cri.LinuxContainerSecurityContext(run_as_user=cri.Int64Value(value=0))
    assert encode(user) == b"\x2a\x00"
    assert encode(cri.LinuxContainerSecurityContext()) == b""


@pytest.mark.parametrize("kind", [cri.RunPodSandboxRequest, cri.CreateContainerRequest])
def test_every_cut_is_noticed(kind: type[Message]) -> None:
    """At the border of a field a cut message is a shorter, valid one; anywhere else it is refused."""
    raw = encode(sample(random.Random(5), kind))
    ends = {len(raw) - len(rest) for rest in _fields(raw)}
    assert len(raw) > 200
    for cut in range(len(raw)):
        if cut in ends:
            strict.check(raw[:cut], kind)
        else:
            with pytest.raises(InvalidArgument, match=kind.__name__):
                strict.check(raw[:cut], kind)


def _fields(raw: bytes) -> list[bytes]:
    """What is left before each top-level field and at the end; an independent, small reader."""
    left, found = raw, []
    while left:
        found.append(left)
        _, left = betterproto2.decode_varint(left, 0)[0], left[betterproto2.decode_varint(left, 0)[1] :]
        size, at = betterproto2.decode_varint(left, 0)
        left = left[at + size :]
    return [*found, b""]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"\x0a\x02a", "2 bytes announced, 1 left at byte 2"),
        (b"\x0a", "a number that does not end"),
        (b"\x0a\xff", "a number that does not end"),
        (b"\x80" * 11, "a number that does not end"),
        (b"\x10" + b"\xff" * 9 + b"\x7f", "more than 64 bits"),
        (b"\x0a\x01\xff", "container_id is not UTF-8"),
        (b"\x08\x01", "container_id has wire type 0, not 2"),
        (b"\x12\x01a", "timeout has wire type 2, not 0"),
        (b"\x0b\x0c", "wire type 3"),
        (b"\x0e", "wire type 6"),
        (b"\x00\x00", "field number 0"),
        (b"\xa1\x06abc", "8 bytes announced, 3 left"),
        (b"\xa5\x06abc", "4 bytes announced, 3 left"),
    ],
)
def test_what_breaks_the_wire_format_is_named(raw: bytes, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        strict.check(raw, cri.StopContainerRequest)


def test_errors_name_the_nested_field() -> None:
    bad = b"\x0a\x05\x3a\x03\x0a\x01\xff"  # config {annotations {key: "\xff"}}
    with pytest.raises(InvalidArgument, match=r"config\.annotations\.key is not UTF-8 at byte 6"):
        strict.check(bad, cri.RunPodSandboxRequest)


def test_repeated_numbers_come_packed_or_not() -> None:
    for raw in (b"\x42\x02\x05\x06", b"\x40\x05\x40\x06"):
        strict.check(raw, cri.LinuxContainerSecurityContext)
        assert cri.LinuxContainerSecurityContext.parse(raw).supplemental_groups == [5, 6]
    with pytest.raises(InvalidArgument, match="does not end"):
        strict.check(b"\x42\x02\x05\x86", cri.LinuxContainerSecurityContext)


def test_the_number_of_fields_is_bounded() -> None:
    empty = b"\x1a\x00" * (strict.FIELD_LIMIT + 1)  # command: ""
    with pytest.raises(ResourceExhausted, match="more than"):
        strict.check(empty, cri.ContainerConfig)
    packed = b"\x01" * (strict.FIELD_LIMIT + 1)
    with pytest.raises(ResourceExhausted, match="more than"):
        strict.check(b"\x42" + _varint(len(packed)) + packed, cri.LinuxContainerSecurityContext)


def _varint(value: int) -> bytes:
    return betterproto2.encode_varint(value)


def test_fixed_width_numbers() -> None:
    data = cri.PsiData(avg_10=1.5)
    assert encode(data) == bytes(data) == b"\x11" + struct.pack("<d", 1.5)
    strict.check(encode(data), cri.PsiData)
