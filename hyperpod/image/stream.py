"""The uncompressed bytes of a layer blob, in pieces of bounded size. Runs in the converter's own process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import zlib
from collections.abc import Iterator

from hyperpod.errors import ImageError, Unavailable
from hyperpod.logs import printable

PIECE = 1 << 20
"""Largest piece handed out, bytes; a bomb inflates no further than this before it is counted."""
_READ = 1 << 17
GZIP = b"\x1f\x8b"
ZSTD = b"\x28\xb5\x2f\xfd"


class Blob:
    """A seekable blob. `pieces` may be called again; the digest covers the compressed bytes."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size
        self._magic = os.pread(fd, 4, 0)
        self._hash = hashlib.sha256()
        self._hashed = False

    @property
    def digest(self) -> str:
        """`sha256:<hex>` of the blob; whole only after the first complete `pieces`."""
        return f"sha256:{self._hash.hexdigest()}"

    def pieces(self) -> Iterator[bytes]:
        """Uncompressed bytes. Raises ImageError for a damaged stream."""
        if self._magic[:2] == GZIP:
            yield from self._gzip()
        elif self._magic == ZSTD:
            yield from self._zstd()
        else:
            yield from self._raw(PIECE)
        self._hashed = True

    def _raw(self, step: int) -> Iterator[bytes]:
        at = 0
        while data := os.pread(self._fd, step, at):
            at += len(data)
            if not self._hashed:
                self._hash.update(data)
            yield data

    def _gzip(self) -> Iterator[bytes]:
        """RFC 1952: one or more members, nothing behind the last."""
        member = zlib.decompressobj(wbits=31)
        for data in self._raw(_READ):
            left = data
            while left:
                if member.eof:
                    member = zlib.decompressobj(wbits=31)
                try:
                    piece = member.decompress(left, PIECE)
                except zlib.error as exc:
                    raise ImageError(f"the layer's gzip stream is damaged: {exc}") from exc
                left = member.unused_data if member.eof else member.unconsumed_tail
                if piece:
                    yield piece
        if not member.eof:
            raise ImageError("the layer's gzip stream is cut off")

    def _zstd(self) -> Iterator[bytes]:
        """RFC 8878, by the `zstd` program: Python 3.11 has no reader of its own."""
        try:
            child = subprocess.Popen(
                ["zstd", "-dcq", "--no-progress"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except FileNotFoundError as exc:
            raise Unavailable("the layer is packed with zstd; install the package zstd") from exc
        assert child.stdin and child.stdout and child.stderr
        sink = child.stdin

        def pump() -> None:
            try:
                for data in self._raw(_READ):
                    sink.write(data)
                sink.close()
            except OSError:
                pass  # zstd gave up; its exit code and message say why

        feeder = threading.Thread(target=pump, name="zstd feeder", daemon=True)
        feeder.start()
        try:
            while piece := child.stdout.read(PIECE):
                yield piece
            message = child.stderr.read(2048)
            if child.wait() != 0:
                raise ImageError(f"the layer's zstd stream is damaged: {printable(message, 200).strip()}")
        finally:
            child.kill()
            child.wait()
            feeder.join()
            child.stdout.close()
            child.stderr.close()
