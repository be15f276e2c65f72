"""The yardstick of boot times: QEMU alone, the same kernel and root image, up to init."""

from __future__ import annotations

import json
import os
import re
import selectors
import subprocess
import time
from pathlib import Path

from tests.daemonkit import artifact

DEADLINE = 120.0

INIT_REACHED = b"Requested init "
"""The panic of a kernel that has mounted its root and finds no such init: the moment at which it would run it.
It is the one message of that moment that `quiet` lets through."""


class BareBoot:
    """Boots of the kernel and image that the daemon under test uses."""

    def __init__(self, memory_mib: int) -> None:
        kernel = artifact("HYPERPOD_TEST_KERNEL", "kernel/build.py")
        guest = artifact("HYPERPOD_TEST_GUEST", "images/build.py")
        machine, root = (_manifest(folder) for folder in (kernel, guest))
        cmdline = re.sub(r"\binit=\S+", "init=/missing", f"{machine['cmdline']} {root['cmdline']}")
        self._command = [
            *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", str(memory_mib)),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
            *("-kernel", str(kernel / machine["kernel"]), "-append", cmdline),
            *(("-initrd", str(kernel / machine["initrd"])) if machine["initrd"] else ()),
            *("-drive", f"file={guest / root['root']},format=raw,if=none,id=root,readonly=on"),
            *("-device", "virtio-blk-pci,drive=root", "-device", "virtio-rng-pci"),
        ]
        self.versions = f"kernel {machine['release']}, image {root['version']}"

    def measure(self) -> float:
        """Seconds from starting QEMU until the kernel wants to run init."""
        start = time.monotonic()
        process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        console = b""
        try:
            with selectors.DefaultSelector() as ready:
                ready.register(process.stdout, selectors.EVENT_READ)
                while (left := start + DEADLINE - time.monotonic()) > 0:
                    if ready.select(left):
                        data = os.read(process.stdout.fileno(), 65536)
                        console += data
                        if INIT_REACHED in console:
                            return time.monotonic() - start
                        if not data:
                            break
            raise RuntimeError(f"the kernel did not get to init: {console[-2000:].decode(errors='replace')}")
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def _manifest(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / "manifest.json").read_text())
    return found
