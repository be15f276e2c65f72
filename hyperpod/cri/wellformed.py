"""Enums keep numbers that their interface does not know; those may not reach the services."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import betterproto2

from hyperpod.errors import InvalidArgument

log = logging.getLogger(__name__)


def check(message: betterproto2.Message, where: str = "") -> None:
    """Look at all of a message that came through `rpc.strict`. Raises InvalidArgument that names the field."""
    if message._unknown_fields:
        log.warning("%s has fields of a newer CRI, which are ignored", where or type(message).__name__)
    for field in dataclasses.fields(message):  # type: ignore[arg-type]  # every message is a dataclass
        value = getattr(message, field.name)
        place = f"{where}.{field.name}" if where else field.name
        if isinstance(value, list):
            for number, item in enumerate(value):
                _value(f"{place}[{number}]", item)
        else:
            _value(place, value)


def _value(where: str, value: Any) -> None:
    if isinstance(value, betterproto2.Enum) and value not in list(type(value)):
        raise InvalidArgument(f"{where} has the unknown value {int(value)}")
    if isinstance(value, betterproto2.Message):
        check(value, where)
