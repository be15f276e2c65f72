#!/usr/bin/env python3
"""Build the guest's root image out of Debian packages and the agent; prints the folder that has it.

The result is cached as $HYPERPOD_CACHE/guest-<hash of the inputs>/ with
  root.img        read-only file system: Python, crun, their libraries, the agent; byte code only
  manifest.json   {"kind":"guest","version","root","fstype","api_version","cmdline",...}: the daemon reads it
Nothing of a package is executed but Python (it compiles the modules, and proves that the agent can be imported
from the finished tree) and `crun --version`. The same inputs give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from images import envexec, modules, tree  # noqa: E402  (the path above is needed first)
from kernel import packages  # noqa: E402
from kernel.artifacts import (  # noqa: E402
    BuildError,
    cache_dir,
    hash_inputs,
    publishing,
    say,
    write_manifest,
)

API_VERSION = 1
AGENT = "hyperpod.agent.main"

# Third-party packages are looked up in the project's environment; these are never taken along although
# something imports them: the libraries can do without, or do so in code that the agent never runs.
WITHOUT_PACKAGES = frozenset(
    {"pydantic", "pydantic_core", "certifi", "googleapis_common_protos", "opentelemetry"}
)

# What compilers and formats are told; part of the hash, as is the text of the builder itself.
FORMATS = {
    "squashfs": [
        *("mksquashfs", "{tree}", "{image}", "-quiet", "-no-progress", "-noappend", "-comp", "lz4"),
        *("-Xhc", "-b", "131072", "-all-root", "-no-xattrs", "-no-exports"),
        *("-all-time", "0", "-mkfs-time", "0"),
    ],
    "erofs": [
        *("mkfs.erofs", "-T0", "-U00000000-0000-0000-0000-000000000000", "--all-root", "-x-1"),
        *("{image}", "{tree}"),
    ],
}
# Emulated, kernel start to the agent's first line: squashfs lz4 1.87 s (10 MB) and uncompressed 1.87 s, EROFS
# uncompressed 1.88 s (21 MB) and lz4 1.97 s, squashfs zstd 2.08 s (8 MB); to init all of them 0.73 s.
DEFAULT_FORMAT = "squashfs"


def site_packages() -> Path:
    """Where the project's Python dependencies are. Raises BuildError."""
    for root in (Path(sys.prefix) if sys.prefix != sys.base_prefix else None, ROOT / ".venv"):
        found = sorted(root.glob("lib/python3*/site-packages")) if root else []
        if found and (found[0] / "grpclib").is_dir():
            return found[0]
    raise BuildError("the project's Python environment is missing: ./dev setup")


def agent_modules(entry: str, root: Path = ROOT) -> modules.Closure:
    """The agent's modules and those of its dependencies; `unknown` names what Python itself must have."""
    found = modules.follow([entry], [root, site_packages()], WITHOUT_PACKAGES, extensions=False)
    if entry not in found.files:
        raise BuildError(f"there is no module {entry} in {root}")
    return found


def inputs(
    entry: str, fstype: str, agent: modules.Closure, debs: list[packages.Package]
) -> dict[str, object]:
    """What decides the result, as plain JSON."""
    digest = hashlib.sha256()
    for name, path in sorted(agent.files.items()):
        digest.update(f"{name}\0{path.name == '__init__.py'}\0".encode() + path.read_bytes() + b"\0")
    for path in [*sorted((ROOT / "images").glob("*.py")), ROOT / "kernel/packages.py"]:
        digest.update(path.read_bytes())
    return {
        "entry": entry,
        "fstype": fstype,
        "envexec": envexec.inputs(),
        "sources": digest.hexdigest(),
        "packages": {p.name: [p.version, p.sha256] for p in debs},
    }


def agent_version() -> str:
    """The project's version."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def build(folder: Path, entry: str, fstype: str, agent: modules.Closure, given: dict[str, object]) -> None:
    """Make the tree, prove that it can start the agent, and write image and manifest into `folder`."""
    started = time.monotonic()
    python = packages.python_minor()
    debs = packages.resolve(tree.package_names(python))
    files = packages.fetch(debs)
    entries: dict[str, packages.Entry] = {}
    for deb in debs:
        entries.update(packages.contents(files[deb.name]))
    with tempfile.TemporaryDirectory(prefix="work-", dir=folder) as work:
        builder = tree.Builder(Path(work), entries, python)
        builder.add_agent(entry, agent)
        builder.add_texts(entry)
        builder.check(entry)
        image = folder / "root.img"
        command = [part.format(tree=builder.tree, image=image) for part in FORMATS[fstype]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")
    version = f"{agent_version()}-{hash_inputs(given)}"
    cmdline = f"root=/dev/vda rootfstype={fstype} ro {tree.CMDLINE}"
    write_manifest(
        folder,
        {
            "kind": "guest",
            "version": version,
            "root": "root.img",
            "fstype": fstype,
            "api_version": API_VERSION,
            "agent_version": agent_version(),
            "cmdline": cmdline,
            "python": python,
            "packages": {p.name: p.version for p in debs},
            "inputs": given,
        },
    )
    size = image.stat().st_size / 1e6
    say(f"guest image: {version}, {fstype}, {size:.1f} MB, in {time.monotonic() - started:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--print-path", action="store_true", help="only say where the result is or would be")
    parser.add_argument("--fstype", choices=sorted(FORMATS), default=DEFAULT_FORMAT)
    parser.add_argument("--entry", default=AGENT, help="module whose main() becomes PID 1 (for tests)")
    parser.add_argument("--path", type=Path, default=ROOT, help="folder that has its package (for tests)")
    arguments = parser.parse_args()
    try:
        agent = agent_modules(arguments.entry, arguments.path)
        debs = packages.resolve(tree.package_names(packages.python_minor()))
        given = inputs(arguments.entry, arguments.fstype, agent, debs)
        path = cache_dir() / f"guest-{hash_inputs(given)}"
        if not arguments.print_path:
            with publishing(path) as folder:
                if folder is not None:
                    build(folder, arguments.entry, arguments.fstype, agent, given)
    except (BuildError, SyntaxError, subprocess.CalledProcessError) as error:
        say(f"images/build.py: {error}")
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
