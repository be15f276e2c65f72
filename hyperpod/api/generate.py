"""Generates hyperpod/api/gen out of the .proto files beside this one: `python -m hyperpod.api.generate`.

With `--check` nothing is written: exit code 1 and a list when the committed code differs.
Needs the `dev` extra (grpcio-tools, betterproto2_compiler).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

API = Path(__file__).parent
GENERATED = API / "gen"
PROTOS = ("admin.proto", "agent.proto", "agentstats.proto", "cri.proto")
OPTIONS = ("client_generation=async", "server_generation=async")


def generate(out: Path) -> None:
    """Write the package's files below `out`. Raises subprocess.CalledProcessError with protoc's words."""
    # protoc finds the plugin on PATH; the one beside this interpreter fits its betterproto2.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(API), f"--python_betterproto2_out={out}"]
    command += [f"--python_betterproto2_opt={option}" for option in OPTIONS]
    command += [str(API / name) for name in PROTOS]
    subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def drift(committed: Path = GENERATED) -> list[str]:
    """Names of files that are missing, superfluous or different from what the .proto files give."""
    with tempfile.TemporaryDirectory(prefix="hyperpod-api-") as folder:
        generate(Path(folder))
        fresh, old = _contents(Path(folder)), _contents(committed)
    return sorted(name for name in fresh.keys() | old.keys() if fresh.get(name) != old.get(name))


def write(target: Path = GENERATED) -> None:
    """Bring `target` to what the .proto files give; files that do not change keep their times."""
    with tempfile.TemporaryDirectory(prefix="hyperpod-api-") as folder:
        generate(Path(folder))
        fresh = _contents(Path(folder))
    for name in _contents(target).keys() - fresh.keys():
        (target / name).unlink()
    for name, data in fresh.items():
        path = target / name
        if not path.exists() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def main() -> int:
    parser = argparse.ArgumentParser(description="generate the gRPC code")
    parser.add_argument("--check", action="store_true", help="compare only")
    if parser.parse_args().check:
        names = drift()
        for name in names:
            print(f"{GENERATED / name}: not what the .proto files give", file=sys.stderr)  # noqa: T201  a tool
        return 1 if names else 0
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
