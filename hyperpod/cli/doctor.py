"""`hyperpod doctor`: what this host has, what it lacks, and the one-line mend."""

from __future__ import annotations

import argparse
import asyncio
import platform

from hyperpod.config import VmConfig
from hyperpod.container.seccomp import runtime_default
from hyperpod.daemon_args import config_of
from hyperpod.errors import HyperpodError, NetworkError
from hyperpod.hypervisor.doctor import Check, checks
from hyperpod.model.sandbox import Kind
from hyperpod.network.confdir import ConfDir
from hyperpod.sandbox import artifacts
from hyperpod.sandbox.host import find_crun
from hyperpod.sandbox.userns import UserNamespaces
from hyperpod.share import virtiofsd
from hyperpod.spec.profile import Target


def file_server(setting: str) -> Check:
    """What a pod's mounts come through; not needed when they are switched off."""
    found = virtiofsd.program()
    return Check(
        "virtiofsd",
        found is not None,
        setting != "off",
        found.path if found else "not found",
        f"apt-get install {virtiofsd.PACKAGE}",
    )


def oci_runtime() -> Check:
    """VM pods have theirs in the guest."""
    try:
        return Check("crun, for host pods", True, False, str(find_crun()))
    except HyperpodError as exc:
        return Check("crun, for host pods", False, False, str(exc))


def user_namespaces(settings: VmConfig) -> list[Check]:
    """What pods with `hostUsers: false` need."""
    can = UserNamespaces(settings)
    found = []
    for kind, name in ((Kind.VM, "VM pods"), (Kind.HOST, "host pods")):
        why = asyncio.run(can.missing(kind))
        found.append(Check(f"user namespaces of {name}", not why, False, why or "can be had"))
    return found


def main(args: argparse.Namespace) -> int:
    """Exit code 0 when all that is required is there."""
    config = config_of(args)
    missing = 0
    for check in [
        *checks(config.vm.accelerator),
        file_server(config.vm.virtiofs),
        oci_runtime(),
        *user_namespaces(config.vm),
    ]:
        print(f"{'ok     ' if check.found else 'MISSING'} {check.name}: {check.detail}")
        if not check.found and check.required:
            missing += 1
            print(f"        mend: {check.mend}")
    for what, find, folder in (
        ("guest kernel", artifacts.kernel, config.vm.kernel),
        ("guest image", artifacts.guest, config.vm.guest),
    ):
        try:
            print(f"ok      {what}: {find(folder).version}")
        except HyperpodError as exc:
            missing += 1
            print(f"MISSING {what}: {exc}")
    try:
        runtime_default(config.container.seccomp_profile, Target(frozenset(), platform.machine()))
        print(f"ok      default seccomp profile: {config.container.seccomp_profile}")
    except HyperpodError as exc:
        missing += 1
        print(f"MISSING {exc}")
    try:
        network = ConfDir(config.network.conf_dir, config.network.bin_dirs).current()
        print(f"ok      pods' network: {network.name} ({network.source})")
    except NetworkError as exc:  # not missing for good: add-ons bring it once the node is up
        print(f"MISSING pods' network: {exc}")
    return 1 if missing else 0
