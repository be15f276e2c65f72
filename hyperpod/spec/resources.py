"""From CRI resources to the size of a VM (DESIGN section 3).

RAM = guest base + max(memory limit or default, floor), rounded up; vCPUs = ceil(quota / period), else the
default. What is over the configured maximum of vCPUs is clamped and said; RAM beyond the host's is refused.
"""

from __future__ import annotations

from hyperpod.errors import InvalidArgument
from hyperpod.model.sandbox import VmSize
from hyperpod.model.security import LinuxResources
from hyperpod.spec.domain import TRANSLATED_MIB

MIB = 1 << 20
ROUND_MIB = 16
HOST_SHARE_MIB = 64
"""What QEMU, virtiofsd and the shim take beside the guest's RAM; an emulator has its translated code as well."""

DEFAULT_PERIOD = 100_000
"""Microseconds; the kernel's default CFS period, meant where a quota comes without one."""


def vm_size(
    resources: LinuxResources,
    overhead: LinuxResources,
    *,
    base_mib: int,
    floor_mib: int,
    default_mib: int,
    default_vcpus: int,
    max_vcpus: int,
    max_memory_mib: int,
    host_memory_mib: int,
    host_cpus: int,
    emulated: bool = False,
    only_cpu: str = "",
    bounded: bool = True,
) -> VmSize:
    """Decide a VM's size. Raises InvalidArgument when its RAM would exceed the host's.

    `only_cpu`: why it cannot have more than one vCPU, whatever the host has; empty when it can.
    `bounded`: every container of the pod has a memory limit, as far as is known. A kubelet's sum leaves out those
    that have none, for which there has to be room, too."""
    wanted = -(-resources.memory_limit // MIB) if resources.memory_limit > 0 else default_mib
    if not bounded:
        wanted = max(wanted, default_mib)
    memory = base_mib + max(wanted, floor_mib)
    memory = -(-memory // ROUND_MIB) * ROUND_MIB
    if memory > host_memory_mib:
        raise InvalidArgument(
            f"the pod asks for {wanted} MiB, so for a VM of {memory} MiB; this host has {host_memory_mib} MiB"
        )
    vcpus = default_vcpus
    if resources.cpu_quota > 0:
        vcpus = -(-resources.cpu_quota // (resources.cpu_period or DEFAULT_PERIOD))
    limit = 1 if only_cpu else min(max_vcpus, max(host_cpus, 1))
    clamped = min(max(vcpus, 1), limit)
    reason = f"{base_mib} base + max({wanted}, {floor_mib})"
    # The pod's cgroup on the host has room for limit and overhead; the base comes out of the latter.
    share = HOST_SHARE_MIB + (TRANSLATED_MIB if emulated else 0)
    if 0 < overhead.memory_limit < (base_mib + share) * MIB:
        reason += (
            f"; the pod's overhead of {overhead.memory_limit // MIB} MiB is less than the {base_mib} MiB of the "
            f"guest and the {share} MiB of QEMU and shim: its cgroup may be too small for it"
        )
    if clamped != vcpus:
        reason += f"; {vcpus} vCPUs asked for, {limit} is the most here"
        reason += f" ({only_cpu})" if only_cpu else ""
    return VmSize(
        memory_mib=memory,
        vcpus=clamped,
        max_memory_mib=min(max(max_memory_mib, memory) if max_memory_mib else 2 * memory, host_memory_mib),
        max_vcpus=max(limit, clamped),
        reason=reason,
    )
