#!/usr/bin/env python3
"""Compile images/envexec.c; prints the path of the program. An agent on a host is told it by HYPERPOD_ENVEXEC."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kernel.artifacts import BuildError, cache_dir, publishing, say, write_manifest  # noqa: E402  (the path above is needed first)
from kernel.build import compiler_version  # noqa: E402

SOURCE = ROOT / "images" / "envexec.c"
NAME = "envexec"
COMMAND = ("gcc", "-Os", "-static", "-s", "-Wall", "-Wl,--build-id=none", "-o", "{result}", "{source}")
"""Static: containers may have no C library, or another one."""


def inputs() -> str:
    """What decides the bytes, hashed."""
    parts = [SOURCE.read_text(), " ".join(COMMAND), compiler_version()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def build() -> Path:
    """The program, compiled unless it is in the cache. Raises BuildError."""
    target = cache_dir() / f"envexec-{inputs()[:16]}"
    with publishing(target) as folder:
        if folder is not None:
            command = [part.format(result=folder / NAME, source=SOURCE) for part in COMMAND]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise BuildError(f"{SOURCE.name}: {done.stderr.strip()[-2000:]}")
            write_manifest(folder, {"kind": "envexec", "version": inputs()[:16], "program": NAME})
    return target / NAME


if __name__ == "__main__":
    try:
        print(build())
    except (BuildError, OSError) as error:
        say(f"images/envexec.py: {error}")
        sys.exit(1)
