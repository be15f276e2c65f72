"""Which place a pod gets, from what its request says, and who may have the host. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from hyperpod.errors import InvalidArgument, PermissionDenied
from hyperpod.model.sandbox import Kind, SandboxConfig
from hyperpod.model.security import NamespaceMode, NamespaceOptions
from hyperpod.spec.sysctls import namespace_of

HANDLERS = ("", "vm", "host")
"""Runtime handlers; the empty one is what pods without a RuntimeClass have."""

EVERY = "*"
NAMESPACES = ("network", "pid", "ipc")


def of_node(options: NamespaceOptions) -> list[str]:
    """Names of the namespaces that are to be the host's."""
    return [name for name in NAMESPACES if getattr(options, name) is NamespaceMode.NODE]


def choose(handler: str, options: NamespaceOptions) -> Kind:
    """A VM, unless the handler says host, or none is named and a namespace is to be the host's.

    Raises InvalidArgument for an unknown handler, and for a VM with the host's namespaces."""
    if handler not in HANDLERS:
        raise InvalidArgument(
            f"no runtime handler {handler[:100]!r}; there are {', '.join(map(repr, HANDLERS))}"
        )
    if handler == "host":
        return Kind.HOST
    names = of_node(options)
    if handler == "vm" and names:
        raise InvalidArgument(
            f"namespace option {names[0]}=NODE needs a host pod, and a VM has its own {names[0]}: "
            "give the pod the runtime handler host, or none"
        )
    return Kind.HOST if names else Kind.VM


def permit(config: SandboxConfig, allowed: Collection[str]) -> None:
    """Whether a pod may be a host pod. Raises PermissionDenied that names the setting."""
    namespace = config.metadata.namespace
    if EVERY not in allowed and namespace not in allowed:
        names = ", ".join(sorted(allowed)) or "none"
        raise PermissionDenied(
            f"pod {config.metadata.name} asks for the host (runtime handler host or a NODE namespace), which pods "
            f"of the namespace {namespace} may not have: the setting host_pods allows {names}"
        )


def check_container(kind: Kind, pod: NamespaceOptions, container: NamespaceOptions) -> None:
    """A container's own options name the pod's namespaces or its own; none leads out of the pod.

    Raises InvalidArgument."""
    for name in of_node(container):
        if getattr(pod, name) is not NamespaceMode.NODE:
            why = f"the pod's own {name} namespace is not the host's"
            if kind is Kind.VM:
                why = f"it needs a host pod: a pod in a VM has a {name} namespace of its own"
            raise InvalidArgument(f"config.linux.security_context.namespace_options.{name} is NODE: {why}")
    if kind is Kind.HOST and container.pid is NamespaceMode.POD and pod.pid is NamespaceMode.CONTAINER:
        raise InvalidArgument(
            "config.linux.security_context.namespace_options.pid is POD: the pod was made with CONTAINER, so it "
            "has no pid namespace that its containers could share"
        )


def check_sysctls(sysctls: Mapping[str, str], options: NamespaceOptions) -> None:
    """Of a host pod: only those of its own namespaces. Raises InvalidArgument."""
    for name in sysctls:
        owner = namespace_of(name)
        if not owner:
            raise InvalidArgument(
                f"config.linux.sysctls: {name} is the whole host's, a host pod may not set it"
            )
        if getattr(options, owner) is NamespaceMode.NODE:
            raise InvalidArgument(
                f"config.linux.sysctls: {name} is the host's, since the pod's {owner} namespace is NODE"
            )
