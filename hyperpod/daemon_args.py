"""The options that `hyperpod serve`, the daemon and `hyperpod doctor` share."""

from __future__ import annotations

import argparse
from pathlib import Path

from hyperpod.config import Config, load


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add them to a parser."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML configuration")
    parser.add_argument("--listen", metavar="unix://PATH", help="CRI endpoint")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="durable state")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="volatile state")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"))


def config_of(args: argparse.Namespace) -> Config:
    """The configuration that the arguments lead to. Raises InvalidArgument that names the key."""
    names = ("listen", "state_dir", "run_dir", "log_level")
    return load(args.config, {name: getattr(args, name) for name in names})
