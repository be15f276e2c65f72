"""`hyperpod COMMAND`: serve, run, exec and so on. Heavy imports happen in the command that needs them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hyperpod import __version__
from hyperpod.errors import HyperpodError

DEFAULT_ENDPOINT = "unix:///run/hyperpod/cri.sock"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="hyperpod", description="A CRI runtime with a VM per pod.")
    top.add_argument("--version", action="version", version=f"hyperpod {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the runtime in the foreground")
    from hyperpod.daemon_args import arguments

    arguments(serve)

    run = commands.add_parser("run", help="run an image in a pod of its own, print its output, remove it")
    run.add_argument("--endpoint", default=DEFAULT_ENDPOINT, metavar="unix://PATH")
    run.add_argument("--pull", choices=("missing", "always", "never"), default="missing")
    run.add_argument("--handler", default="", help="CRI runtime handler")
    run.add_argument("--memory", type=int, default=0, metavar="MIB", help="memory limit of the pod")
    run.add_argument("--env", action="append", default=[], metavar="K=V")
    run.add_argument("--timings", action="store_true", help="print how long each phase took")
    run.add_argument("image")
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="CMD")

    loading = commands.add_parser("load", help="take an OCI layout or a docker archive into the store")
    loading.add_argument("--endpoint", default=DEFAULT_ENDPOINT, metavar="unix://PATH")
    loading.add_argument("file", metavar="FILE")

    exec_ = commands.add_parser("exec", help="run a command in a running container")
    attach = commands.add_parser("attach", help="see what a running container prints, and type to it")
    for one in (exec_, attach):
        one.add_argument("--endpoint", default=DEFAULT_ENDPOINT, metavar="unix://PATH")
        one.add_argument("-i", "--stdin", action="store_true", help="pass standard input on")
        one.add_argument("-t", "--tty", action="store_true", help="with a terminal")
        one.add_argument("container", metavar="CONTAINER")
    forward = commands.add_parser("port-forward", help="make ports of a pod reachable on 127.0.0.1")
    for one in (exec_, attach, forward):
        _tls(one)
    exec_.add_argument("argv", nargs=argparse.REMAINDER, metavar="CMD")

    forward.add_argument("--endpoint", default=DEFAULT_ENDPOINT, metavar="unix://PATH")
    forward.add_argument("pod", metavar="POD")
    forward.add_argument("ports", nargs="+", metavar="[LOCAL:]REMOTE", help="LOCAL 0: any that is free")

    console = commands.add_parser(
        "console", help="the last lines of a VM's console, or a shell in a pod's sandbox"
    )
    console.add_argument("--endpoint", default=DEFAULT_ENDPOINT, metavar="unix://PATH")
    console.add_argument(
        "--shell", action="store_true", help="a shell beside the containers (operator_shell)"
    )
    console.add_argument("pod", metavar="POD")

    demo = commands.add_parser("demo", help="the whole life of a pod, step by step, against a running daemon")
    demo.add_argument("--endpoint", default=DEFAULT_ENDPOINT, metavar="unix://PATH")
    demo.add_argument("image")

    doctor = commands.add_parser("doctor", help="check what this host has and lacks")
    arguments(doctor)
    return top


def _tls(command: argparse.ArgumentParser) -> None:
    """Where the daemon's streaming server has a certificate."""
    command.add_argument(
        "--config", type=Path, metavar="FILE", help="configuration, whose [client] has these too"
    )
    command.add_argument(
        "--tls-ca", type=Path, metavar="FILE", help="authorities to trust, else the system's"
    )
    command.add_argument("--tls-cert", type=Path, metavar="FILE", help="our certificate")
    command.add_argument("--tls-key", type=Path, metavar="FILE", help="its key")
    command.add_argument(
        "--tls-server-name", default="", metavar="NAME", help="which the server's certificate has"
    )
    command.add_argument("--insecure-skip-tls-verify", action="store_true", help="trust whoever answers")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    raw = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(raw)
    try:
        if args.command == "serve":
            from hyperpod.supervisor.main import main as supervise

            return supervise(raw[1:])
        if args.command == "run":
            from hyperpod.cli.run import main as run

            return run(args)
        if args.command == "load":
            from hyperpod.cli.load import main as load

            return load(args)
        if args.command == "demo":
            from hyperpod.cli.demo import main as demo

            return demo(args)
        if args.command in ("exec", "attach", "port-forward", "console"):
            from hyperpod.cli.streams import main as streams

            return streams(args)
        from hyperpod.cli.doctor import main as doctor

        return doctor(args)
    except HyperpodError as exc:
        print(f"hyperpod: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
