"""Debian packages as plain files: chosen and fetched by apt, opened without running anything of theirs."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import posixpath
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from kernel.artifacts import BuildError, cache_dir, say

_URI_LINE = re.compile(r"'(?P<uri>[^']+)' (?P<file>\S+) \d+ SHA256:(?P<sha256>[0-9a-f]{64})")

# Folders that merged-/usr systems have as links; package files below them move.
MERGED = ("bin", "sbin", "lib", "lib32", "lib64")


@dataclasses.dataclass(frozen=True, order=True)
class Package:
    """One package file that apt would fetch now."""

    name: str
    version: str
    file: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file or link out of a package. Exactly one of `data` and `link` is set."""

    mode: int
    data: bytes | None = None
    link: str | None = None


def python_minor() -> str:
    """The Python that this Debian release's python3 package stands for, such as "3.11". Raises BuildError."""
    done = subprocess.run(
        ["apt-cache", "depends", "python3-minimal"], capture_output=True, text=True, check=False
    )
    match = re.search(r"Depends: python(3\.\d+)-minimal", done.stdout)
    if match is None:
        raise BuildError("apt-cache does not know python3-minimal: apt-get update")
    return match.group(1)


def resolve(names: Iterable[str]) -> list[Package]:
    """The version of each package that apt would fetch now, without fetching. Raises BuildError."""
    done = subprocess.run(
        ["apt-get", "download", "--print-uris", *names], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise BuildError(f"apt-get cannot fetch packages: {done.stderr.strip()} (apt-get update?)")
    found = []
    for match in map(_URI_LINE.match, done.stdout.splitlines()):
        if match:
            name, version, _arch = match["file"].removesuffix(".deb").split("_")
            found.append(Package(name, version.replace("%3a", ":"), match["file"], match["sha256"]))
    return sorted(found)


def fetch(packages: Iterable[Package]) -> dict[str, Path]:
    """Fetch what the cache lacks; each file's hash is the one in apt's signed index. Returns name -> file."""
    store = cache_dir() / "debs"
    store.mkdir(parents=True, exist_ok=True)
    packages = list(packages)
    missing = [p for p in packages if not (store / p.sha256).is_file()]
    if missing:
        say(f"fetching {len(missing)} Debian packages")
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=store) as folder:
            # As root, apt wants its own user to write there; the files' hashes are checked below in any case.
            command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download"]
            done = subprocess.run(
                [*command, *(f"{p.name}={p.version}" for p in missing)],
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                raise BuildError(f"apt-get download failed: {done.stderr.strip()}")
            for package in missing:
                path = Path(folder) / package.file
                if hashlib.sha256(path.read_bytes()).hexdigest() != package.sha256:
                    raise BuildError(
                        f"{package.file} is not what apt's index says: apt-get update, then again"
                    )
                path.rename(store / package.sha256)
    return {p.name: store / p.sha256 for p in packages}


def contents(deb: Path) -> dict[str, Entry]:
    """Files and links of a package by their path without the leading slash, moved to merged-/usr places."""
    entries: dict[str, Entry] = {}
    stream = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(deb)], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(stream)) as tar:
        for member in tar:
            path = merged(member.name)
            if member.issym():
                entries[path] = Entry(0o777, link=member.linkname)
            elif member.islnk():
                entries[path] = entries[merged(member.linkname)]
            elif member.isreg():
                file = tar.extractfile(member)
                assert file is not None
                entries[path] = Entry(member.mode & 0o777, data=file.read())
    return entries


def merged(name: str) -> str:
    """The place of a package's path on a merged-/usr system: ./lib/x -> usr/lib/x."""
    path = posixpath.normpath("/" + name).lstrip("/")
    return f"usr/{path}" if path.split("/")[0] in MERGED else path
