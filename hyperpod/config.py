"""One validated configuration; each component is handed its own section (README lists every key).

Sources, later ones win: defaults, the TOML file of `--config`, the command line.
"""

from __future__ import annotations

import ipaddress
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hyperpod.errors import InvalidArgument

MAX_RUN_DIR = 60
"""Bytes; a UNIX socket path holds 107 and libvirt's longest below the run folder takes 45."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VmConfig(Section):
    """How VMs are made. Sizes in MiB, times in seconds."""

    kernel: Path = Path("/usr/share/hyperpod/kernel")
    guest: Path = Path("/usr/share/hyperpod/guest")
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    libvirt_uri: str = ""
    """Empty: libvirt's driver inside the daemon; or for example qemu:///system."""
    guest_base_mib: int = Field(default=96, ge=32)
    """What the guest's kernel and agent take before any container."""
    memory_floor_mib: int = Field(default=160, ge=32)
    default_memory_mib: int = Field(default=416, ge=32)
    """For containers, when the pod names no memory limit."""
    default_vcpus: int = Field(default=1, ge=1, le=64)
    max_vcpus: int = Field(default=8, ge=1, le=254)
    max_memory_mib: int = Field(default=0, ge=0)
    """Up to what a VM may be resized later; 0 is twice its size."""
    scratch_mib: int = Field(default=10240, ge=64)
    """Size of the sparse disk for the writable layers of a pod."""
    max_concurrent_boots: int = Field(default=0, ge=0)
    """More wait for their turn: many boots at once would all be slow. 0 is twice the host's CPUs."""
    virtiofs: Literal["boot", "demand", "off"] = "boot"
    """When a pod gets the file server that its mounts come through; off: containers with mounts are refused."""
    boot_timeout: float = Field(default=90.0, gt=0)
    uid_base: int = Field(default=1_500_000, ge=1000)
    uid_count: int = Field(default=4096, ge=1)
    """Each VM and its shim run as a uid of their own, from uid_base + 1 on. Their one gid, uid_base, may read
    image layers and nothing else."""


class ImageConfig(Section):
    """Pulls and the store; see hyperpod.image.settings for what each bound protects."""

    mirror: str = ""
    """`host:port` that stands in for every registry host (the path is kept); for labs, air-gapped nodes."""
    insecure_registries: tuple[str, ...] = ()
    max_concurrent_pulls: int = Field(default=3, ge=1)
    stall_timeout: float = Field(default=60.0, gt=0)


class NetworkConfig(Section):
    """Pods' networks by CNI; the first file of `conf_dir` in lexical order is the one that pods join."""

    conf_dir: Path = Path("/etc/cni/net.d")
    bin_dirs: tuple[Path, ...] = (Path("/opt/cni/bin"), Path("/usr/lib/cni"))
    conf_template: Path | None = None
    """A conflist with holes for the node's pod networks (hyperpod/spec/cnitemplate.py)."""
    plugin_timeout: float = Field(default=60.0, gt=0)
    """Seconds for one call of one plugin."""


class ContainerConfig(Section):
    """What containers get."""

    seccomp_profile: Path = Path("/usr/share/containers/seccomp.json")
    """RuntimeDefault, in OCI's or Docker's form; Debian: golang-github-containers-common, which skopeo needs."""
    unset_seccomp_profile: Literal["RuntimeDefault", "Unconfined"] = "Unconfined"
    """For a security context without a profile. CRI says unconfined; a kubelet always names one."""
    filter_unconfined: bool = False
    """Deny AF_VSOCK and AF_ALG sockets to unconfined and privileged containers as well, by a filter."""


class StreamingConfig(Section):
    """Where exec, attach and port-forward are served. Times in seconds."""

    address: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    """0: any that is free; the URLs tell."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    """PEM; read again when they change. Without them plain HTTP, and no byte passes the daemon."""
    tls_client_ca: Path | None = None
    """Only clients with a certificate of it are served."""
    idle_timeout: float = Field(default=14400.0, ge=0)
    """Without a byte either way; 0 is for ever."""
    creation_timeout: float = Field(default=30.0, gt=0)
    """For a client to open its streams."""

    @field_validator("address")
    @classmethod
    def _literal(cls, value: str) -> str:
        ipaddress.ip_address(value)
        return value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        return self


class ClientConfig(Section):
    """For the command line, where the streaming server has TLS; its options go before these."""

    tls_ca: Path | None = None
    """Authorities that may have signed the server's certificate; none: the system's."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    """Ours, where the server has tls_client_ca."""
    tls_server_name: str = ""
    """The name in the server's certificate, where it is not the URL's."""


class Config(Section):
    """The whole configuration."""

    state_dir: Path = Path("/var/lib/hyperpod")
    run_dir: Path = Path("/run/hyperpod")
    listen: str = ""
    """CRI endpoint; empty: unix://<run_dir>/cri.sock."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    cgroup_driver: Literal["auto", "cgroupfs", "systemd"] = "auto"
    sandbox_slots: int = Field(default=512, ge=1)
    host_pods: tuple[str, ...] = ("kube-system",)
    """Kubernetes namespaces whose pods may share the host's kernel; "*" is every one, an empty list none."""
    operator_shell: bool = False
    """Whether root of this host may have a shell in a sandbox beside its containers: `hyperpod console --shell`."""
    vm: VmConfig = VmConfig()
    image: ImageConfig = ImageConfig()
    network: NetworkConfig = NetworkConfig()
    container: ContainerConfig = ContainerConfig()
    streaming: StreamingConfig = StreamingConfig()
    client: ClientConfig = ClientConfig()

    @field_validator("state_dir", "run_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        """Programs that we start, in folders of their own, are given paths below."""
        return Path.cwd() / value

    @field_validator("state_dir")
    @classmethod
    def _plain(cls, value: Path) -> Path:
        if found := {*",\\"} & {*str(value)}:
            raise ValueError(
                f"state_dir {str(value)!r} has a {found.pop()!r}, which mount options cannot hold"
            )
        return value

    @field_validator("run_dir")
    @classmethod
    def _short(cls, value: Path) -> Path:
        if len(str(value)) > MAX_RUN_DIR:
            raise ValueError(f"run_dir has {len(str(value))} bytes, {MAX_RUN_DIR} fit: sockets live below it")
        return value

    @field_validator("listen")
    @classmethod
    def _unix(cls, value: str) -> str:
        if value and not value.startswith("unix:///"):
            raise ValueError(f"listen is {value!r}; it must be unix:///an/absolute/path")
        return value

    @property
    def operator_socket(self) -> Path:
        """Where operators' shells are served, when they are allowed."""
        return self.run_dir / "operator.sock"

    @property
    def socket_path(self) -> Path:
        return Path(self.listen.removeprefix("unix://")) if self.listen else self.run_dir / "cri.sock"


def load(path: Path | None, overrides: dict[str, Any]) -> Config:
    """Read and validate. Raises InvalidArgument that names the file and the key."""
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(path.read_text())
        except OSError as exc:
            raise InvalidArgument(f"configuration {path}: {exc.strerror}") from exc
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise InvalidArgument(f"configuration {path}: {exc}") from exc
    data.update({k: v for k, v in overrides.items() if v is not None})
    try:
        return Config.model_validate(data)
    except ValidationError as exc:
        first = exc.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InvalidArgument(
            f"configuration {path or 'from the command line'}: {key}: {first['msg']}"
        ) from exc
