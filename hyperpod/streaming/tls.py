"""Certificates of the streaming server, read again when their files change."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from hyperpod.errors import InvalidArgument

log = logging.getLogger(__name__)


class Certificates:
    """`context` for each new connection; a change that cannot be loaded leaves the old ones in use."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        """Raises InvalidArgument: they cannot be loaded."""
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._stamp = self._look()
        try:
            self._context = self._load()
        except (OSError, ssl.SSLError) as exc:
            raise InvalidArgument(
                f"streaming: certificate {cert} or key {key} cannot be used: {exc}"
            ) from exc

    def context(self) -> ssl.SSLContext:
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._context = self._load()
            except (OSError, ssl.SSLError) as exc:
                log.error("streaming: the changed certificates cannot be used, the old ones stay: %s", exc)
            else:
                log.info("streaming: certificates loaded again")
        return self._context

    def _look(self) -> tuple[tuple[int, int, int], ...]:
        stamps = []
        for path in (self._cert, self._key, self._client_ca):
            try:
                found = path.stat() if path is not None else None
            except OSError:
                found = None
            stamps.append((found.st_ino, found.st_mtime_ns, found.st_size) if found else (0, 0, 0))
        return tuple(stamps)

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self._cert, self._key)
        if self._client_ca is not None:
            context.load_verify_locations(self._client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context
