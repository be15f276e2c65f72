"""Phase timings of one boot, and the phase's name on every failure; how long the parts of other calls took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from hyperpod.errors import BootError, HyperpodError, InvalidArgument, NetworkError


class Phases:
    """`with phases("domain"): ...` measures, and turns an error inside into a BootError of that phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        except (BootError, InvalidArgument, NetworkError):  # these name what is wrong, and say it with a code
            raise
        except (HyperpodError, OSError, TimeoutError) as exc:
            raise BootError(name, str(exc) or type(exc).__name__) from exc
        finally:
            self.seconds[name] = round(time.monotonic() - start, 4)


class Laps:
    """`laps("agent")` at the end of each part of a call: the seconds since the one before, or since it was made."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def __call__(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._last = round(now - self._last, 4), now
