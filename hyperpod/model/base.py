"""The base of all records."""

from __future__ import annotations

import time

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Immutable; unknown fields are refused so that a damaged record is noticed; bytes are base64 in JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")


def now_ns() -> int:
    """Host wall clock, nanoseconds since the epoch: the only source of times in records."""
    return time.time_ns()
