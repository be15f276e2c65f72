"""The guest's file tree: chosen files of packages, compiled modules, libraries that something needs."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

from images import modules
from kernel.artifacts import BuildError
from kernel.packages import Entry

LIBRARIES = "usr/lib/x86_64-linux-gnu"
LOADER = f"{LIBRARIES}/ld-linux-x86-64.so.2"

# Folders that the agent mounts things on, and those that programs expect.
FOLDERS = (
    "dev",
    "proc",
    "sys",
    "run",
    "tmp",
    "mnt",
    "l",
    "scratch",
    "root",
    "etc",
    "var/lib",
    "var/tmp",
    "opt",
)
LINKS = {
    **{name: f"usr/{name}" for name in ("bin", "sbin", "lib", "lib64")},
    "var/run": "/run",
    "etc/mtab": "/proc/self/mounts",
}
TEXTS = {
    "etc/passwd": "root:x:0:0:root:/root:/sbin/nologin\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/os-release": 'ID=hyperpod\nNAME="hyperpod guest"\n',
}

# The kernel runs this as PID 1. -I: nothing from the environment, -S: no site-packages; both save time.
INIT = """#!/usr/bin/python3 -IS
import sys
from {entry} import main
sys.exit(main(["--guest"]))
"""

# The C library opens it by name when a thread is cancelled, so nothing lists it as needed.
OPENED_BY_NAME = (f"{LIBRARIES}/libgcc_s.so.1",)

# What `crun --version` says, so that the agent need not start it to answer Hello (50 ms emulated).
CRUN_VERSION = "etc/hyperpod/crun-version"

# Parts of the standard library that modules import for features that the agent has no use for. Without ssl
# (and OpenSSL) `import asyncio` takes half the time. The import check at the end of a build guards the list.
WITHOUT_STDLIB = frozenset(
    {
        *(
            "ssl",
            "_ssl",
            "_hashlib",
            "bz2",
            "_bz2",
            "lzma",
            "_lzma",
            "sqlite3",
            "readline",
            "curses",
            "tkinter",
        ),
        *(
            "unittest",
            "doctest",
            "pdb",
            "pydoc",
            "test",
            "idlelib",
            "lib2to3",
            "distutils",
            "ensurepip",
            "venv",
        ),
        *("multiprocessing", "xml", "xmlrpc", "http", "ftplib", "smtplib", "webbrowser", "urllib.request"),
        *(
            "asyncio.windows_events",
            "asyncio.windows_utils",
            "ctypes.test",
            "ctypes.macholib",
            "ctypes.wintypes",
        ),
        *("_pydecimal", "_pyio", "concurrent.futures.process", "cProfile", "profile", "turtle", "turtledemo"),
        *(
            "email",
            "zipfile",
            "tarfile",
            "importlib.metadata",
            "getpass",
            "code",
            "cmd",
            "optparse",
            "decimal",
        ),
    }
)
# Found by name at the interpreter's start, or when text is decoded.
ENCODINGS = ("utf_8", "ascii", "latin_1", "idna", "aliases")

# Modules of dependencies that would drag in a lot for nothing in the guest, replaced by these few words.
# betterproto2: its version comes from package metadata, which the guest has not (the compiler's check ran
# when the code was generated). multidict: asks `platform` which Python this is, to choose the C version.
STAND_INS = {
    "betterproto2._version": (
        '__version__ = "guest"\n\n\ndef check_compiler_version(compiler_version):\n    """Done on the host."""\n'
    ),
    "multidict._compat": "USE_EXTENSIONS = False\n",
}

# Compiles [source, result, name shown in tracebacks] triples; unchecked hash: no times, no stat at start.
COMPILE = """
import json, py_compile, sys
for source, result, shown in json.load(sys.stdin):
    py_compile.compile(source, result, shown, doraise=True, optimize=0,
                       invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
"""

CHECK = """
import importlib, json, sys
importlib.import_module(sys.argv[1])
json.dump([getattr(m, "__file__", None) or "" for m in sys.modules.values()], sys.stdout)
"""


def package_names(python: str) -> list[str]:
    """The Debian packages that the tree is made from; a library that is missing among them fails the build."""
    return [
        *(f"python{python}-minimal", f"libpython{python}-minimal", f"libpython{python}-stdlib", "crun"),
        *("libc6", "libgcc-s1", "libexpat1", "zlib1g", "libffi8", "libuuid1", "libcap2", "libseccomp2"),
        *("libsystemd0", "libyajl2", "libgcrypt20", "libgpg-error0", "liblz4-1", "liblzma5", "libzstd1"),
    ]


class Builder:
    """Makes the tree below `work`. Raises BuildError when a file, library or module is missing."""

    def __init__(self, work: Path, entries: dict[str, Entry], python: str) -> None:
        self.tree = work / "tree"
        self._stage = work / "stage"  # complete packages: the interpreter that compiles, sources
        self._entries = entries
        self._python = python
        self._lib = f"usr/lib/python{python}"
        for path, entry in entries.items():
            if path.startswith((LIBRARIES, self._lib)) or path == f"usr/bin/python{python}":
                _write(self._stage, path, entry)
        for folder in FOLDERS:
            (self.tree / folder).mkdir(parents=True, exist_ok=True)
        for path, link in LINKS.items():
            _write(self.tree, path, Entry(0o777, link=link))
        for path, text in TEXTS.items():
            _write(self.tree, path, Entry(0o644, data=text.encode()))
        _write(self.tree, "usr/bin/python3", Entry(0o777, link=f"python{python}"))
        (self.tree / "usr/sbin").mkdir()

    def add_agent(self, entry: str, agent: modules.Closure) -> None:
        """Compile the agent with all that it imports, and add the programs with all that they link to."""
        compiled: dict[str, Path] = {}
        for number, (name, text) in enumerate(sorted(STAND_INS.items())):
            if name in agent.files:
                compiled[name] = self._stage / f"stand-in-{number}.py"
                compiled[name].write_text(text)
        compiled = {**agent.files, **compiled}
        wanted = [n for n in agent.unknown if not n.startswith(tuple(f"{m}." for m in STAND_INS))]
        standard = self._standard_library(
            [*wanted, "os", "encodings", *(f"encodings.{e}" for e in ENCODINGS)]
        )
        objects = {n: p for n, p in standard.items() if p.suffix == ".so"}
        compiled.update({n: p for n, p in standard.items() if p.suffix == ".py"})
        self._compile(compiled)
        binaries = [f"usr/bin/python{self._python}", "usr/bin/crun", *OPENED_BY_NAME, LOADER]
        binaries += [str(path.relative_to(self._stage)) for path in objects.values()]
        (self.tree / self._lib / "lib-dynload").mkdir(parents=True, exist_ok=True)
        for path in binaries:
            self._copy(path)
        _write(self.tree, "usr/lib64/ld-linux-x86-64.so.2", Entry(0o777, link=f"/{LOADER}"))
        self._link_libraries(binaries)
        _write(self.tree, CRUN_VERSION, Entry(0o644, data=self._crun_version().encode()))
        _write(self.tree, "init", Entry(0o755, data=INIT.format(entry=entry).encode()))

    def check(self, entry: str) -> None:
        """Import the agent by the tree's own interpreter, and see that all came from the tree."""
        done = self._run_python(self.tree, CHECK, entry)
        foreign = [f for f in json.loads(done) if f and not f.startswith(str(self.tree))]
        if foreign:
            raise BuildError(f"modules loaded from outside of the tree: {foreign}")

    def _standard_library(self, names: list[str]) -> dict[str, Path]:
        root = self._stage / self._lib
        roots = [root, root / "lib-dynload"]
        return modules.follow(names, roots, WITHOUT_STDLIB, extensions=True).files

    def _compile(self, sources: dict[str, Path]) -> None:
        jobs = []
        for name, source in sorted(sources.items()):
            relative = name.replace(".", "/") + ("/__init__" if source.name == "__init__.py" else "")
            result = self.tree / self._lib / f"{relative}.pyc"
            result.parent.mkdir(parents=True, exist_ok=True)
            jobs.append((str(source), str(result), f"/{self._lib}/{relative}.py"))
        self._run_python(self._stage, COMPILE, stdin=json.dumps(jobs))

    def _run_python(self, root: Path, code: str, *arguments: str, stdin: str = "") -> str:
        command = [str(root / LOADER), "--library-path", str(root / LIBRARIES)]
        command += [str(root / f"usr/bin/python{self._python}"), "-sSBP", "-c", code, *arguments]
        environment = {"PYTHONHASHSEED": "0"}  # it orders the sets in byte code
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, check=False, env=environment
        )
        if done.returncode != 0:
            raise BuildError(f"the guest's Python failed:\n{done.stderr.strip()[-4000:]}")
        return done.stdout

    def _crun_version(self) -> str:
        command = [str(self._stage / LOADER), "--library-path", str(self._stage / LIBRARIES)]
        command += [str(self.tree / "usr/bin/crun"), "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        match = re.match(r"crun version (\S+)", done.stdout)
        if match is None:
            raise BuildError(f"crun --version answers {done.stdout[:200]!r} {done.stderr[:200]!r}")
        return f"{match.group(1)}\n"

    def _copy(self, path: str) -> None:
        entry = self._entries.get(path)
        if entry is None:
            raise BuildError(f"no package has {path}")
        _write(self.tree, path, entry)

    def _link_libraries(self, binaries: list[str]) -> None:
        """Add the shared libraries that the binaries need, from the packages alone."""
        loader = [str(self._stage / LOADER), "--library-path", str(self._stage / LIBRARIES), "--list"]
        for binary in binaries:
            if binary == LOADER:
                continue
            done = subprocess.run(
                [*loader, str(self.tree / binary)], capture_output=True, text=True, check=False
            )
            missing = re.findall(r"(\S+) => not found", done.stdout)
            if missing or (done.returncode != 0 and "statically linked" not in done.stdout):
                raise BuildError(
                    f"{binary}: no package has {missing or done.stderr.strip()}; see package_names"
                )
            for name in re.findall(r"^\s*([^/\s]+) => /", done.stdout, re.MULTILINE):
                self._copy_library(name)

    def _copy_library(self, name: str) -> None:
        """A library under the name that programs ask for; links to it are resolved to the file."""
        path = f"{LIBRARIES}/{name}"
        entry = self._entries.get(path)
        while entry is not None and entry.link is not None:
            path = os.path.normpath(f"{path}/../{entry.link}")
            entry = self._entries.get(path)
        if entry is None:
            raise BuildError(f"no package has {LIBRARIES}/{name}")
        _write(self.tree, f"{LIBRARIES}/{name}", entry)


def _write(root: Path, path: str, entry: Entry) -> None:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    if entry.link is not None:
        target.unlink(missing_ok=True)
        target.symlink_to(entry.link)
    else:
        target.write_bytes(entry.data or b"")
        target.chmod(0o755 if entry.mode & 0o111 else 0o644)
