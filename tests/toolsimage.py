"""An image with programs of this host and the libraries that they need, for tests that want more than busybox."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from tests.imagekit import Item, folder, image, symlink, tar, write_layout

NAME = "docker.io/library/tools:latest"
FOLDERS = ("bin", "etc", "lib64", "root", "tmp", "usr", "usr/bin", "usr/lib", "var", "lib")
OPENED_BY_NAME = ("/lib/x86_64-linux-gnu/libgcc_s.so.1",)
"""The C library loads it when a thread is cancelled (Debian 13's iperf3 does that), so nothing lists it."""

APPLETS = ("sh", "sleep", "echo", "cat", "sha256sum")


def _libraries(program: Path) -> set[str]:
    """Paths of the shared libraries, and of the loader, as this host's loader finds them."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"(/\S+) \(0x", listed))


def write(path: Path, *programs: str) -> Path:
    """An OCI layout folder of busybox's shell and `programs`, which must be installed."""
    found = [Path(shutil.which(name) or name) for name in programs]
    files = {f"usr/bin/{file.name}": file for file in found}
    for library in set(OPENED_BY_NAME).union(*map(_libraries, found)):
        files[library.lstrip("/")] = Path(library)
    folders = {*FOLDERS, *(str(p) for name in files for p in Path(name).parents if str(p) != ".")}
    items = [folder(name, 0o1777 if name == "tmp" else 0o755) for name in sorted(folders)]
    items += [Item(name, file.read_bytes(), mode=0o755) for name, file in sorted(files.items())]
    items.append(Item("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755))
    items += [symlink(f"bin/{name}", "busybox") for name in APPLETS]
    items.append(Item("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n"))
    config = {"Cmd": ["sh"], "Env": ["PATH=/usr/bin:/bin"]}
    return write_layout(path, image(tar(*items), packed=False, config=config), NAME)
