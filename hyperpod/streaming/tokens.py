"""One-shot tokens: what a streaming URL stands for until somebody uses it, or a minute has gone."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hyperpod.errors import ResourceExhausted
from hyperpod.wire.remotecommand import Wanted

LIFETIME = 60.0
"""Seconds."""
MAX_TOKENS = 1000
_RANDOM_BYTES = 24


@dataclass(frozen=True)
class Target:
    """`kind`: exec, attach or portforward, as in the URL; `ident`: of the container, or of the sandbox."""

    kind: str
    ident: str
    argv: tuple[str, ...] = ()
    wanted: Wanted = field(default_factory=Wanted)
    ports: tuple[int, ...] = ()


class Tokens:
    """Bounded in number; a token says nothing about its target."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, tuple[float, Target]] = {}  # in the order of their ends

    def __len__(self) -> int:
        return len(self._known)

    def issue(self, target: Target) -> str:
        """Raises ResourceExhausted."""
        self._expire()
        if len(self._known) >= MAX_TOKENS:
            raise ResourceExhausted(f"{MAX_TOKENS} streaming requests wait for their clients already")
        token = secrets.token_urlsafe(_RANDOM_BYTES)
        self._known[token] = (self._clock() + LIFETIME, target)
        return token

    def redeem(self, kind: str, token: str) -> Target | None:
        """The target, once; None for one that is unknown, used, expired or of another kind."""
        self._expire()
        found = self._known.get(token)
        if found is None or found[1].kind != kind:
            return None
        del self._known[token]
        return found[1]

    def _expire(self) -> None:
        now = self._clock()
        while self._known:
            token, (end, _) = next(iter(self._known.items()))
            if end > now:
                return
            del self._known[token]
