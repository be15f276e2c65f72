"""The network configuration folder: the first file in lexical order decides, read again when the folder changed.

A first file that cannot be read is an error and not a reason to take the second: that may be another network.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from hyperpod.errors import NetworkError
from hyperpod.spec.cni import MAX_DOCUMENT, Conflist, parse_conflist

SUFFIXES = (".conflist", ".conf", ".json")


class ConfDir:
    """`conf_dir`: usually /etc/cni/net.d. `bin_dirs`: where the plugins are, searched in order."""

    def __init__(self, conf_dir: Path, bin_dirs: Sequence[Path]) -> None:
        self.conf_dir, self.bin_dirs = conf_dir, tuple(bin_dirs)
        self._signature: tuple[object, ...] | None = None
        self._found: Conflist | str = "not read yet"
        """Of the file with that signature; text says what is wrong with it."""

    def current(self) -> Conflist:
        """The network that new pods join. Raises NetworkError that names the file or folder, and the mend."""
        files = self._files()
        signature = tuple(_facts(path) for path in files[:1])
        if signature != self._signature or not files:
            self._found = self._read(files)
            self._signature = signature
        if isinstance(self._found, str):
            raise NetworkError(self._found)
        self._need_plugins(self._found)
        return self._found

    def _files(self) -> list[Path]:
        with contextlib.suppress(OSError):
            paths = [
                self.conf_dir / name for name in sorted(os.listdir(self.conf_dir)) if name.endswith(SUFFIXES)
            ]
            return [path for path in paths if not path.is_dir()]
        return []

    def _read(self, files: list[Path]) -> Conflist | str:
        if not files:
            return (
                f"no CNI network: {self.conf_dir} has no file that ends in {', '.join(SUFFIXES)}; "
                "install a network add-on, or put a conflist there (deploy/ has one)"
            )
        path = files[0]
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # reading a FIFO would wait for somebody to write
                return f"{path}: not a file; remove it"
            with path.open("rb") as file:
                raw = file.read(MAX_DOCUMENT + 1)
            return parse_conflist(str(path), raw.decode())
        except OSError as exc:
            return f"{path}: {exc.strerror}; mend or remove this file"
        except UnicodeDecodeError:
            return f"{path}: not UTF-8; mend or remove this file"
        except NetworkError as exc:
            return f"{exc}; mend or remove this file"

    def _need_plugins(self, network: Conflist) -> None:
        """Looked up each time: an add-on's installer copies its plugins after its configuration."""
        for plugin in network.plugins:
            for name in plugin.programs:
                self.program(name, network.source)

    def program(self, name: str, source: str) -> str:
        """The path of a plugin. Raises NetworkError that names it and where it was looked for."""
        for folder in self.bin_dirs:
            path = folder / name
            if os.access(path, os.X_OK) and path.is_file():
                return str(path)
        places = ", ".join(map(str, self.bin_dirs))
        raise NetworkError(
            f"CNI plugin {name!r}, which {source} wants, is not in {places}; install it there "
            "(Debian: containernetworking-plugins), or set network.bin_dirs"
        )


def _facts(path: Path) -> tuple[object, ...]:
    """Changes whenever the file does."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return str(path), found.st_ino, found.st_size, found.st_mtime_ns
    return str(path), None
