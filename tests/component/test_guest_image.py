"""The guest's root image as built from real packages: the same bytes each time, nothing unwanted in it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from images import modules, tree
from images.importer import Archive

ROOT = Path(__file__).resolve().parents[2]


def build(cache: Path, packages: Path) -> Path:
    """Run the builder with a cache of its own that shares only the fetched packages."""
    cache.mkdir()
    (cache / "debs").symlink_to(packages)
    done = subprocess.run(
        [sys.executable, str(ROOT / "images" / "build.py")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "HYPERPOD_CACHE": str(cache)},
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two builds that know nothing of each other."""
    base = tmp_path_factory.mktemp("guest-image")
    (base / "debs").mkdir()
    return [build(base / name, base / "debs") for name in ("one", "two")]


@pytest.fixture(scope="module")
def content(images: list[Path]) -> Path:
    """The unpacked tree."""
    target = images[0] / "unpacked"
    subprocess.run(["unsquashfs", "-q", "-n", "-d", str(target), str(images[0] / "root.img")], check=True)
    return target


def test_two_builds_give_the_same_bytes(images: list[Path]) -> None:
    one, two = ({f: (folder / f).read_bytes() for f in ("root.img", "manifest.json")} for folder in images)
    assert images[0].name == images[1].name
    assert one == two


def test_manifest_is_what_the_daemon_reads(images: list[Path]) -> None:
    manifest = json.loads((images[0] / "manifest.json").read_text())
    assert manifest["kind"] == "guest" and manifest["api_version"] == 1
    assert (images[0] / manifest["root"]).is_file()
    assert f"rootfstype={manifest['fstype']}" in manifest["cmdline"].split()
    assert {"crun", "libc6"} <= manifest["packages"].keys()


def test_byte_code_only_and_no_ssl(content: Path) -> None:
    files = [p.relative_to(content) for p in content.rglob("*") if p.is_file() and not p.is_symlink()]
    assert [p for p in files if p.suffix == ".py"] == []
    assert [
        p for p in files if p.name.startswith(("ssl.", "_ssl.", "libssl", "libcrypto", "_hashlib."))
    ] == []
    assert {"hyperpod.agent.main", "asyncio", "grpclib.server"} <= names(content)


def test_byte_code_never_looks_at_a_source(content: Path) -> None:
    """Flags 1 in the header: hash-based and unchecked, so the bytes carry no time."""
    for path in content.rglob("*.pyc"):
        assert path.read_bytes()[4:8] == b"\x01\0\0\0", path


def test_nothing_special_in_the_tree(content: Path) -> None:
    for path in content.rglob("*"):
        mode = path.lstat().st_mode
        assert stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode), path
        assert stat.S_ISLNK(mode) or not mode & 0o7022, f"{path} {oct(mode)}"


def names(content: Path) -> set[str]:
    """The modules in the guest's archive."""
    return set(Archive(str(next(content.glob("usr/lib/python3*/modules")))).index)


def test_agent_takes_none_of_the_hosts_side_along(content: Path) -> None:
    hosts = ("config", "cri", "store", "hypervisor", "image", "sandbox")
    unwanted = tuple([f"hyperpod.{name}" for name in hosts] + ["pydantic", "libvirt"])
    assert [name for name in names(content) if f"{name}.".startswith(tuple(f"{u}." for u in unwanted))] == []


def test_start_and_first_call_run_no_lazy_module_and_compile_nothing(content: Path) -> None:
    """What is lazy would not be lazy if an import of the agent, or what every pod's Hello needs, used it."""
    library = next(content.glob("usr/lib/python3*/importer.pyc")).parent
    lazy = {name for name, entry in Archive(str(library / "modules")).index.items() if entry[3]}
    code = (
        f"import sys; sys.path.insert(0, {str(library)!r}); import importer; importer.install()\n"
        "importer.texts.unknown = []\n"
        "import hyperpod.agent.main\n"
        "from hyperpod.agent import messages, network\n"
        "from hyperpod.api.gen.hyperpod.agent import v1\n"
        "messages.evaluate_once()\n"
        "card = v1.NetworkInterface(name='eth0', routes=[v1.Route(metric=7)])\n"
        "hello = v1.HelloRequest(api_version=1, sysctls={'a': 'b'}, interfaces=[card])\n"
        "assert v1.HelloRequest.parse(bytes(hello)) == hello and bytes(v1.HelloResponse(cpus=1))\n"
        "assert importer.texts.known and importer.texts.unknown == []\n"
        "print(*[n for n, m in sys.modules.items() if type(m) is importer.LazyModule])"
    )
    libraries = content / tree.LIBRARIES
    done = subprocess.run(
        [content / tree.LOADER, "--library-path", libraries, content / "usr/bin/python3", "-ISB", "-"],
        input=code,
        capture_output=True,
        text=True,
        check=True,
    )
    used = (
        set() if "python3.11" in str(library) else {"inspect"}
    )  # dataclasses of 3.13 asks it for annotations
    assert lazy == tree.LAZY and lazy - set(done.stdout.split()) <= used


def test_import_closure_follows_code(tmp_path: Path) -> None:
    package = tmp_path / "p"
    (package / "sub").mkdir(parents=True)
    for name, text in {
        "__init__.py": "",
        "a.py": "from typing import TYPE_CHECKING\nfrom . import b\nif TYPE_CHECKING:\n    import p.never\n",
        "b.py": "def late():\n    from .sub.c import x\n    import importlib\n    importlib.import_module('p.d')\n",
        "d.py": "import json.decoder\n",
        "never.py": "",
        "unused.py": "",
        "sub/__init__.py": "",
        "sub/c.py": "from .. import e\nx = e\n",
        "e.py": "",
    }.items():
        (package / name).write_text(text)
    found = modules.follow(["p.a"], [tmp_path], frozenset({"p.e"}), extensions=False)
    assert set(found.files) == {"p", "p.a", "p.b", "p.d", "p.sub", "p.sub.c"}
    assert {"json.decoder", "typing", "importlib"} <= found.unknown
