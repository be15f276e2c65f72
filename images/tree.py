"""The guest's file tree: chosen files of packages, compiled modules, libraries that something needs."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from images import bytecode, envexec, modules
from kernel.artifacts import BuildError
from kernel.packages import Entry

HERE = Path(__file__).resolve().parent
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

# PID 1: the kernel starts Python with it, as byte code, since otherwise this text alone would wake the compiler
# (70 ms emulated). -I: nothing from the environment, -S: no site-packages; both save time.
INIT_PATH = "init.pyc"
# No dummy0 beside the pod's own cards: containers and figures would show it.
CMDLINE = f"dummy.numdummies=0 init=/usr/bin/python3 -- -IS /{INIT_PATH}"

# While the modules are imported there is no garbage to look for.
INIT = """
import gc
gc.disable()
import importer
importer.install()
import sys
from {entry} import main
gc.freeze()
gc.enable()
sys.exit(main(["--guest"]))
"""

# The C library opens it by name when a thread is cancelled, so nothing lists it as needed.
OPENED_BY_NAME = (f"{LIBRARIES}/libgcc_s.so.1",)

# What gives containers environment variables that are not UTF-8.
ENVEXEC = "usr/lib/hyperpod/envexec"

# The operator's shell, and its commands: one static program. hyperpod/agent/shell.py names it.
BUSYBOX = "usr/lib/hyperpod/busybox"

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

# Modules that would drag in a lot for nothing in the guest, replaced by these few words.
# betterproto2: its version comes from package metadata, which the guest has not (the compiler's check ran
# when the code was generated). multidict: asks `platform` which Python this is, to choose the C version, and
# imports pathlib to tell where its headers are. grpclib asks `platform` for its user agent.
STAND_INS = {
    "betterproto2._version": (
        '__version__ = "guest"\n\n\ndef check_compiler_version(compiler_version):\n    """Done on the host."""\n'
    ),
    "multidict": (
        "from ._abc import MultiMapping, MutableMultiMapping\n"
        "from ._multidict_py import CIMultiDict, CIMultiDictProxy, MultiDict, MultiDictProxy, getversion, istr\n"
    ),
    "platform": (
        'def system():\n    return "Linux"\n\n\n'
        'def python_implementation():\n    return "CPython"\n\n\n'
        "def python_version():\n    import sys\n\n    return sys.version.split()[0]\n"
    ),
    "typing_extensions": "from typing import Protocol, Self\n",
}

# Modules that something imports at start and the agent uses later or never: their code runs at first use.
LAZY = frozenset(
    {
        *("asyncio.sslproto", "asyncio.staggered", "inspect", "ipaddress", "json", "linecache", "locale"),
        "textwrap",
    }
)

# Files of their own: what the interpreter itself imports before the importer stands, and the landmark by which
# it knows its library.
BEFORE_IMPORTER = ("encodings", "encodings.aliases", "encodings.utf_8", "os")

# Imports the agent as /init does, then what it imports later, looks at each message as its first use does, and
# prints the texts that had to be compiled.
WRITTEN = """
import sys
sys.path.insert(0, sys.argv[2])
import importer
importer.install()
importer.texts.unknown = []
__import__(sys.argv[1])
package = sys.argv[1].partition(".")[0]
[archive] = [finder for finder in sys.meta_path if isinstance(finder, importer.Archive)]
for name in sorted(archive.index):
    if name.startswith(package + "."):
        __import__(name)
        for thing in list(vars(sys.modules[name]).values()):
            if getattr(thing, "__module__", "") == name:
                getattr(thing, "_betterproto", None)
for module in list(sys.modules.values()):
    hasattr(module, "no such attribute")
import json
json.dump(importer.texts.unknown, sys.stdout)
"""

# The same, and then what is lazy; prints the files of modules.
CHECK = """
import sys
sys.path.insert(0, sys.argv[2])
import importer
importer.install()
__import__(sys.argv[1])
import json
for module in list(sys.modules.values()):
    hasattr(module, "no such attribute")
ours = [m for name, m in sys.modules.items() if name != "__main__"]
json.dump([getattr(m, "__file__", None) or "" for m in ours], sys.stdout)
"""


def package_names(python: str) -> list[str]:
    """The Debian packages that the tree is made from; a library that is missing among them fails the build."""
    return [
        *(f"python{python}-minimal", f"libpython{python}-minimal", f"libpython{python}-stdlib", "crun"),
        *("libc6", "libgcc-s1", "libexpat1", "zlib1g", "libffi8", "libuuid1", "libcap2", "libseccomp2"),
        "busybox-static",
        *("libsystemd0", "libyajl2", "libgcrypt20", "libgpg-error0", "liblz4-1", "liblzma5", "libzstd1"),
    ]


class Builder:
    """Makes the tree below `work`. Raises BuildError when a file, library or module is missing."""

    def __init__(self, work: Path, entries: dict[str, Entry], python: str) -> None:
        self.tree = work / "tree"
        self._stage = work / "stage"  # complete packages: the interpreter that compiles, sources
        self._entries = entries
        self._job: dict[str, Any] = {}
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
        compiled = {**agent.files, **self._stand_ins(agent)}
        wanted = [n for n in agent.unknown if n not in STAND_INS]
        standard = self._standard_library(
            [*wanted, "os", "encodings", *(f"encodings.{e}" for e in ENCODINGS)]
        )
        objects = {n: p for n, p in standard.items() if p.suffix == ".so"}
        compiled.update({n: p for n, p in standard.items() if p.suffix == ".py"})
        self._compile(compiled, INIT.format(entry=entry))
        binaries = [f"usr/bin/python{self._python}", "usr/bin/crun", *OPENED_BY_NAME, LOADER]
        binaries += [str(path.relative_to(self._stage)) for path in objects.values()]
        (self.tree / self._lib / "lib-dynload").mkdir(parents=True, exist_ok=True)
        for path in binaries:
            self._copy(path)
        _write(self.tree, "usr/lib64/ld-linux-x86-64.so.2", Entry(0o777, link=f"/{LOADER}"))
        self._link_libraries(binaries)
        _write(self.tree, ENVEXEC, Entry(0o755, data=envexec.build().read_bytes()))
        _write(self.tree, BUSYBOX, self._entries["usr/bin/busybox"])
        _write(self.tree, CRUN_VERSION, Entry(0o644, data=self._crun_version().encode()))

    def _stand_ins(self, agent: modules.Closure) -> dict[str, Path]:
        found = {}
        for name, text in STAND_INS.items():
            if name in agent.files or name in agent.unknown:
                package = name in agent.files and agent.files[name].name == "__init__.py"
                found[name] = self._stage / "stand-in" / name / ("__init__.py" if package else "module.py")
                found[name].parent.mkdir(parents=True)
                found[name].write_text(text)
        return found

    def check(self, entry: str) -> None:
        """Import the agent by the tree's own interpreter, and see that all came from the tree."""
        done = self._run_python(self.tree, CHECK, entry, str(self.tree / self._lib))
        foreign = [f for f in json.loads(done) if f and not f.startswith(str(self.tree))]
        if foreign:
            raise BuildError(f"modules loaded from outside of the tree: {foreign}")

    def _standard_library(self, names: list[str]) -> dict[str, Path]:
        root = self._stage / self._lib
        roots = [root, root / "lib-dynload"]
        return modules.follow(names, roots, WITHOUT_STDLIB, extensions=True).files

    def _compile(self, sources: dict[str, Path], init: str) -> None:
        """Put the byte code of all modules, and of PID 1, into the tree."""
        library = self.tree / self._lib
        (library / "encodings").mkdir(parents=True, exist_ok=True)
        everything = {**sources, **self._bare_packages(sources)}
        described = {name: self._source(name, path) for name, path in sorted(everything.items())}
        files = [described[name] for name in BEFORE_IMPORTER]
        files.append(self._source("importer", HERE / "importer.py"))
        self._job = {
            "archive": str(library / "modules"),
            "modules": [source for name, source in described.items() if name not in BEFORE_IMPORTER],
            "texts": [],
            "files": [
                (source, str(library / source["shown"].partition(f"{self._lib}/")[2]) + "c")
                for source in files
            ],
        }
        path = self._stage / "init.py"
        path.write_text(init)
        self._job["files"].append((self._source("init", path), str(self.tree / INIT_PATH)))
        self._run_job()

    def _run_job(self) -> None:
        self._run_python(self._stage, (HERE / "bytecode.py").read_text(), stdin=json.dumps(self._job))

    def add_texts(self, entry: str) -> None:
        """Compile what modules write as text when the agent is imported."""
        library = str(self.tree / self._lib)
        self._job["texts"] = json.loads(self._run_python(self.tree, WRITTEN, entry, library))
        self._run_job()

    def _bare_packages(self, sources: dict[str, Path]) -> dict[str, Path]:
        """Folders of modules without an __init__.py: the archive has no folders, so they need an entry."""
        empty = self._stage / "bare" / "__init__.py"
        empty.parent.mkdir(exist_ok=True)
        empty.write_text("")
        parents = {name.rpartition(".")[0] for name in sources if "." in name}
        while more := {name.rpartition(".")[0] for name in parents if "." in name} - parents:
            parents |= more
        return dict.fromkeys(parents - sources.keys(), empty)

    def _source(self, name: str, path: Path) -> bytecode.Source:
        package = path.name == "__init__.py"
        relative = name.replace(".", "/") + ("/__init__" if package else "")
        shown = f"/{self._lib}/{relative}.py"
        return {"name": name, "path": str(path), "shown": shown, "package": package, "lazy": name in LAZY}

    def _run_python(self, root: Path, code: str, *arguments: str, stdin: str = "") -> str:
        script = self._stage / "script.py"  # not `-c`, for which Python 3.13 imports linecache first
        script.write_text(code)
        command = [str(root / LOADER), "--library-path", str(root / LIBRARIES)]
        command += [str(root / f"usr/bin/python{self._python}"), "-sSBP", str(script), *arguments]
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
