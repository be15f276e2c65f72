"""An initramfs in the "newc" cpio format that the kernel unpacks; written without a tool, for stable bytes."""

from __future__ import annotations

import stat


class Archive:
    """Collects folders, files and links; parents must be added before what is in them."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0

    def folder(self, path: str) -> None:
        """Add a folder, mode 0755."""
        self._add(path, stat.S_IFDIR | 0o755, b"")

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._add(path, stat.S_IFREG | mode, data)

    def link(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def finish(self) -> bytes:
        """The whole archive; nothing can be added after it."""
        self._add("TRAILER!!!", 0, b"")
        return b"".join(self._parts)

    def _add(self, path: str, mode: int, data: bytes) -> None:
        name = path.encode() + b"\0"
        self._count += 1
        # inode, mode, uid, gid, links, mtime, size, device major and minor (twice), name size, check
        fields = (self._count, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
        self._parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]
