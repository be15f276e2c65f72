"""The guest kernel's configuration fragment: well formed, complete, and without what must stay out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel import cloud
from kernel.artifacts import BuildError
from kernel.build import FRAGMENT, RECIPE
from kernel.cpio import Archive
from kernel.fragment import Fragment, FragmentError, lost_options

MANDATORY = {
    *("PVH", "VIRTIO_PCI", "VIRTIO_BLK", "SCSI_VIRTIO", "VIRTIO_NET", "VIRTIO_FS", "HW_RANDOM_VIRTIO"),
    *("VSOCKETS", "VIRTIO_VSOCKETS", "OVERLAY_FS", "SQUASHFS", "SQUASHFS_LZ4", "SQUASHFS_ZSTD", "EROFS_FS"),
    *("EXT4_FS", "QUOTA", "QFMT_V2", "QUOTACTL", "FUSE_FS", "DM_VERITY", "SQUASHFS_XATTR", "TMPFS_POSIX_ACL"),
    *("SECCOMP_FILTER", "USER_NS", "PID_NS", "NET_NS", "IPC_NS", "UTS_NS", "TIME_NS", "PSI"),
    *("MEMCG", "CGROUP_PIDS", "CPUSETS", "CFS_BANDWIDTH", "CGROUP_BPF", "BLK_CGROUP", "CGROUP_FREEZER"),
    *(
        "HOTPLUG_PCI_ACPI",
        "HOTPLUG_PCI_PCIE",
        "HOTPLUG_CPU",
        "ACPI_HOTPLUG_CPU",
        "MEMORY_HOTPLUG",
        "VIRTIO_MEM",
    ),
    *("NFT_COMPAT", "NFT_MASQ", "NFT_REDIR", "NFT_TPROXY", "IP_NF_NAT", "IP6_NF_NAT", "IP_SET", "TUN"),
    *("NETFILTER_XT_MATCH_OWNER", "NETFILTER_XT_MATCH_RECENT", "NETFILTER_XT_MATCH_STATISTIC"),
    *("STACKPROTECTOR_STRONG", "HARDENED_USERCOPY", "MITIGATION_RETPOLINE", "PANIC_ON_OOPS"),
}
FORBIDDEN = {
    *("MODULES", "KALLSYMS", "X86_MSR", "DEVMEM", "KEXEC", "KEXEC_FILE", "VSOCKETS_LOOPBACK", "DEBUG_FS"),
    *("CRYPTO_USER_API_HASH", "CRYPTO_USER_API_SKCIPHER", "CRYPTO_USER_API_AEAD", "CRYPTO_USER_API_RNG"),
    *("NFS_FS", "LIBNVDIMM", "PROC_KCORE", "MAGIC_SYSRQ", "LEGACY_TIOCSTI", "USB_SUPPORT", "JUMP_LABEL"),
}


def test_fragment_asks_for_what_pods_need() -> None:
    options = Fragment.read(FRAGMENT).options
    assert {name for name in MANDATORY if options.get(name) != "y"} == set()


def test_fragment_names_what_must_stay_off() -> None:
    options = Fragment.read(FRAGMENT).options
    assert {name for name in FORBIDDEN if name not in options or options[name] is not None} == set()


def test_every_group_has_a_reason() -> None:
    """Options stand in blocks; each block starts with a comment."""
    for block in FRAGMENT.read_text().strip().split("\n\n"):
        assert block.startswith("# ") and not block.startswith("# CONFIG_"), block[:80]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("CONFIG_A=y\nCONFIG_A=y\n", "twice"),
        ("CONFIG_A=y\n# CONFIG_A is not set\n", "twice"),
        ("CONFIG_A=m\n", "neither"),
        ("CONFIG_A=n\n", "neither"),
        ("# CONFIG_A is not set, because\n", "neither"),
        ("CONFIG_A\n", "neither"),
    ],
)
def test_malformed_fragments_are_refused(text: str, reason: str) -> None:
    with pytest.raises(FragmentError, match=reason):
        Fragment.parse(text)


def test_lost_options_are_named() -> None:
    asked = Fragment.parse('CONFIG_A=y\nCONFIG_B="x"\n# CONFIG_C is not set\nCONFIG_D=64\n')
    assert lost_options(asked, {"A": "y", "B": '"x"', "D": "64"}) == []
    assert lost_options(asked, {"B": '"y"', "C": "y", "D": "64"}) == [
        "A: asked for y, is off",
        'B: asked for "x", is "y"',
        "C: asked for off, is y",
    ]


@given(
    st.dictionaries(
        st.from_regex(r"[A-Z0-9_]{1,20}", fullmatch=True), st.sampled_from(["y", "7", '"t"', None])
    )
)
def test_lines_do_not_depend_on_order_or_comments(options: dict[str, str | None]) -> None:
    def text(items: list[tuple[str, str | None]]) -> str:
        return "\n".join(f"CONFIG_{k}={v}" if v is not None else f"# CONFIG_{k} is not set" for k, v in items)

    forth, back = list(options.items()), list(options.items())[::-1]
    parsed = Fragment.parse(text(forth))
    assert parsed.options == options
    assert Fragment.parse("# why\n\n" + text(back)).lines() == parsed.lines()


def test_recipe_fixes_what_the_kernel_puts_into_its_version() -> None:
    environment = RECIPE["environment"]
    assert isinstance(environment, dict)
    assert {"KBUILD_BUILD_TIMESTAMP", "KBUILD_BUILD_USER", "KBUILD_BUILD_HOST"} <= environment.keys()


def test_modules_load_after_what_they_depend_on() -> None:
    modules = {
        "a": b"\0depends=b,c-d\0",
        "b": b"\0depends=c_d,built_in\0",
        "c_d": b"\0depends=\0",
    }
    assert cloud.load_order(("a", "b"), modules, {"built_in"}) == ["c_d", "b", "a"]
    with pytest.raises(BuildError, match="no module x"):
        cloud.load_order(("x",), modules, set())
    with pytest.raises(BuildError, match="each other"):
        cloud.load_order(("p",), {"p": b"\0depends=q\0", "q": b"\0depends=p\0"}, set())


@given(st.lists(st.tuples(st.from_regex(r"[a-z]{1,9}", fullmatch=True), st.binary(max_size=40)), max_size=6))
def test_cpio_fields_are_aligned(files: list[tuple[str, bytes]]) -> None:
    """Each header and each content starts at a multiple of 4, sizes and names are what was given."""
    archive = Archive()
    for name, data in files:
        archive.file(name, data)
    raw, at, seen = archive.finish(), 0, []
    while True:
        assert raw[at : at + 6] == b"070701"
        field = [int(raw[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name = raw[at + 110 : at + 110 + field[11] - 1].decode()
        start = (at + 110 + field[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            break
        seen.append((name, raw[start : start + field[6]]))
        at = (start + field[6] + 3) // 4 * 4
    assert seen == files
