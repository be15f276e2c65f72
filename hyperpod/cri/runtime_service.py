"""runtime.v1.RuntimeService over the managers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from hyperpod import __version__
from hyperpod.api.gen.runtime import v1 as cri
from hyperpod.config import Config
from hyperpod.cri import convert, metrics, replies
from hyperpod.cri.codec import ListCodec, joined
from hyperpod.cri.guard import guarded
from hyperpod.cri.ports import Ports
from hyperpod.errors import NetworkError
from hyperpod.hypervisor.base import Hypervisor
from hyperpod.model.sandbox import Kind
from hyperpod.spec.place import HANDLERS

KUBELET_API = "0.1.0"
"""What VersionResponse.version has been since the first CRI."""


@guarded
class RuntimeService(cri.RuntimeServiceBase):
    """Raises hyperpod errors only; the server's interceptor maps them."""

    def __init__(self, ports: Ports, config: Config, hypervisor: Hypervisor) -> None:
        self._ports, self._config, self._hypervisor = ports, config, hypervisor
        self._pods = ListCodec(replies.pod)
        self._containers = ListCodec(replies.container)

    # -- about us -----------------------------------------------------------------------------------------

    async def version(self, message: cri.VersionRequest) -> cri.VersionResponse:
        return cri.VersionResponse(
            version=KUBELET_API,
            runtime_name="hyperpod",
            runtime_version=__version__,
            runtime_api_version="v1",
        )

    async def status(self, message: cri.StatusRequest) -> cri.StatusResponse:
        conditions = [
            cri.RuntimeCondition(type="RuntimeReady", status=True),
            await self._network_condition(),
        ]
        return cri.StatusResponse(
            status=cri.RuntimeStatus(conditions=conditions),
            info={"hypervisor": self._facts(), "network": self._network()} if message.verbose else {},
            runtime_handlers=[await self._handler(name) for name in HANDLERS],
            features=cri.RuntimeFeatures(supplemental_groups_policy=True),
        )

    async def _handler(self, name: str) -> cri.RuntimeHandler:
        kind = Kind.HOST if name == "host" else Kind.VM
        features = cri.RuntimeHandlerFeatures(
            recursive_read_only_mounts=True,
            user_namespaces=not await self._ports.userns.missing(kind),
        )
        return cri.RuntimeHandler(name=name, features=features)

    async def _network_condition(self) -> cri.RuntimeCondition:
        """Not ready keeps the kubelet from starting pods; the words are what `kubectl describe node` shows."""
        try:
            network = await self._ports.networks.cni.status()
        except NetworkError as exc:
            return cri.RuntimeCondition(
                type="NetworkReady", status=False, reason="NetworkPluginNotReady", message=str(exc)
            )
        return cri.RuntimeCondition(type="NetworkReady", status=True, message=f"CNI network {network.name}")

    def _facts(self) -> str:
        facts = self._hypervisor.facts()
        return json.dumps(
            {
                "accelerator": facts.accelerator,
                "accelerator_reason": facts.accelerator_reason,
                "vhost_vsock": facts.vhost_vsock,
                "libvirt": facts.libvirt_version,
                "qemu": facts.hypervisor_version,
                "state_dir": str(self._config.state_dir),
            }
        )

    def _network(self) -> str:
        conf = self._ports.networks.cni.conf
        known: dict[str, object] = {
            "conf_dir": str(conf.conf_dir),
            "bin_dirs": [str(folder) for folder in conf.bin_dirs],
        }
        try:
            network = conf.current()
            known |= {"file": network.source, "name": network.name, "cni_version": network.version}
            known["plugins"] = [plugin.type for plugin in network.plugins]
        except NetworkError as exc:
            known["error"] = str(exc)
        return json.dumps(known)

    async def runtime_config(self, message: cri.RuntimeConfigRequest) -> cri.RuntimeConfigResponse:
        driver = self._config.cgroup_driver
        if driver == "auto":  # sd_booted(3)
            driver = "systemd" if Path("/run/systemd/system").is_dir() else "cgroupfs"
        value = cri.CgroupDriver.SYSTEMD if driver == "systemd" else cri.CgroupDriver.CGROUPFS
        return cri.RuntimeConfigResponse(linux=cri.LinuxRuntimeConfiguration(cgroup_driver=value))

    async def update_runtime_config(
        self, message: cri.UpdateRuntimeConfigRequest
    ) -> cri.UpdateRuntimeConfigResponse:
        """The pod CIDR, for a node whose conflist is made of a template."""
        runtime = message.runtime_config
        if runtime is not None and runtime.network_config is not None:
            await self._ports.networks.use_pod_cidr(runtime.network_config.pod_cidr)
        return cri.UpdateRuntimeConfigResponse()

    # -- sandboxes ----------------------------------------------------------------------------------------

    async def run_pod_sandbox(self, message: cri.RunPodSandboxRequest) -> cri.RunPodSandboxResponse:
        config = convert.sandbox_config(message.config)
        ident = await self._ports.sandboxes.run(config, message.runtime_handler)
        return cri.RunPodSandboxResponse(pod_sandbox_id=ident)

    async def stop_pod_sandbox(self, message: cri.StopPodSandboxRequest) -> cri.StopPodSandboxResponse:
        await self._ports.sandboxes.stop(message.pod_sandbox_id)
        return cri.StopPodSandboxResponse()

    async def remove_pod_sandbox(self, message: cri.RemovePodSandboxRequest) -> cri.RemovePodSandboxResponse:
        await self._ports.sandboxes.remove(message.pod_sandbox_id)
        return cri.RemovePodSandboxResponse()

    async def pod_sandbox_status(self, message: cri.PodSandboxStatusRequest) -> cri.PodSandboxStatusResponse:
        sandbox = self._ports.sandboxes.get(message.pod_sandbox_id)
        containers = [container.view() for container in self._ports.containers.known.of(sandbox.id)]
        connected = self._ports.networks.connected(sandbox.id)
        reply = replies.pod_status(sandbox, containers, verbose=message.verbose, connected=connected)
        if message.verbose and (host := await self._ports.stats.host(sandbox.id)):
            reply.info["host"] = json.dumps(host)
        if message.verbose:
            reply.info["calls"] = json.dumps(self._ports.sandboxes.live(sandbox.id).calls)
        return reply

    async def update_pod_sandbox_resources(
        self, message: cri.UpdatePodSandboxResourcesRequest
    ) -> cri.UpdatePodSandboxResourcesResponse:
        """The pod's cgroup on the host is the kubelet's to change; here only its VM could be too small."""
        wanted = convert.resources("resources", message.resources)
        self._ports.sandboxes.need_room(message.pod_sandbox_id, wanted)
        return cri.UpdatePodSandboxResourcesResponse()

    # The lists answer with bytes (Encoded), not with messages: Any, since the generated base knows messages only.

    async def list_pod_sandbox(self, message: cri.ListPodSandboxRequest) -> Any:
        await self._pods.warm(self._ports.sandboxes.all())
        items = self._ports.sandboxes.all()
        return self._pods.reply(replies.wanted_pods(items, message.filter), items)

    async def stream_pod_sandboxes(self, message: cri.StreamPodSandboxesRequest) -> AsyncIterator[Any]:
        await self._pods.warm(self._ports.sandboxes.all())
        items = self._ports.sandboxes.all()
        for page in self._pods.pages(replies.wanted_pods(items, message.filter), items):
            yield page

    # -- containers ---------------------------------------------------------------------------------------

    async def create_container(self, message: cri.CreateContainerRequest) -> cri.CreateContainerResponse:
        config = convert.container_config(message.config)
        return cri.CreateContainerResponse(
            container_id=await self._ports.containers.create(message.pod_sandbox_id, config)
        )

    async def start_container(self, message: cri.StartContainerRequest) -> cri.StartContainerResponse:
        await self._ports.containers.start(message.container_id)
        return cri.StartContainerResponse()

    async def stop_container(self, message: cri.StopContainerRequest) -> cri.StopContainerResponse:
        timeout = convert.seconds("timeout", message.timeout)
        await self._ports.containers.stop(message.container_id, timeout)
        return cri.StopContainerResponse()

    async def remove_container(self, message: cri.RemoveContainerRequest) -> cri.RemoveContainerResponse:
        await self._ports.containers.remove(message.container_id)
        return cri.RemoveContainerResponse()

    async def container_status(self, message: cri.ContainerStatusRequest) -> cri.ContainerStatusResponse:
        container = self._ports.containers.known.get(message.container_id)
        sandbox = self._ports.sandboxes.index.find(container.record.sandbox_id)
        kind = Kind.VM if sandbox is None else sandbox.record.kind
        return replies.container_status(container, verbose=message.verbose, kind=kind)

    async def list_containers(self, message: cri.ListContainersRequest) -> Any:
        await self._containers.warm(self._ports.containers.known.all())
        items = self._ports.containers.known.all()
        return self._containers.reply(replies.wanted_containers(items, message.filter), items)

    async def stream_containers(self, message: cri.StreamContainersRequest) -> AsyncIterator[Any]:
        await self._containers.warm(self._ports.containers.known.all())
        items = self._ports.containers.known.all()
        for page in self._containers.pages(replies.wanted_containers(items, message.filter), items):
            yield page

    async def update_container_resources(
        self, message: cri.UpdateContainerResourcesRequest
    ) -> cri.UpdateContainerResourcesResponse:
        await self._ports.containers.update(message.container_id, convert.resources("linux", message.linux))
        return cri.UpdateContainerResourcesResponse()

    # -- statistics ---------------------------------------------------------------------------------------

    async def container_stats(self, message: cri.ContainerStatsRequest) -> cri.ContainerStatsResponse:
        return cri.ContainerStatsResponse(stats=await self._ports.stats.container(message.container_id))

    async def list_container_stats(self, message: cri.ListContainerStatsRequest) -> Any:
        return await joined(await self._ports.stats.containers(message.filter))

    async def stream_container_stats(
        self, message: cri.StreamContainerStatsRequest
    ) -> AsyncIterator[cri.StreamContainerStatsResponse]:
        for page in replies.pages(await self._ports.stats.containers(message.filter)):
            yield cri.StreamContainerStatsResponse(container_stats=page)

    async def pod_sandbox_stats(self, message: cri.PodSandboxStatsRequest) -> cri.PodSandboxStatsResponse:
        return cri.PodSandboxStatsResponse(stats=await self._ports.stats.pod(message.pod_sandbox_id))

    async def list_pod_sandbox_stats(self, message: cri.ListPodSandboxStatsRequest) -> Any:
        return await joined(await self._ports.stats.pods(message.filter))

    async def stream_pod_sandbox_stats(
        self, message: cri.StreamPodSandboxStatsRequest
    ) -> AsyncIterator[cri.StreamPodSandboxStatsResponse]:
        for page in replies.pages(await self._ports.stats.pods(message.filter)):
            yield cri.StreamPodSandboxStatsResponse(pod_sandbox_stats=page)

    async def list_metric_descriptors(
        self, message: cri.ListMetricDescriptorsRequest
    ) -> cri.ListMetricDescriptorsResponse:
        return cri.ListMetricDescriptorsResponse(descriptors=metrics.descriptors())

    async def list_pod_sandbox_metrics(self, message: cri.ListPodSandboxMetricsRequest) -> Any:
        return await joined([pod async for pod in self._ports.stats.metrics()])

    async def stream_pod_sandbox_metrics(
        self, message: cri.StreamPodSandboxMetricsRequest
    ) -> AsyncIterator[cri.StreamPodSandboxMetricsResponse]:
        async for pod in self._ports.stats.metrics():
            yield cri.StreamPodSandboxMetricsResponse(pod_sandbox_metrics=[pod])

    # -- inside of containers -----------------------------------------------------------------------------

    async def exec_sync(self, message: cri.ExecSyncRequest) -> cri.ExecSyncResponse:
        timeout = convert.seconds("timeout", message.timeout)
        result = await self._ports.execs.exec_sync(
            message.container_id, convert.command(message.cmd), timeout
        )
        return cri.ExecSyncResponse(stdout=result.stdout, stderr=result.stderr, exit_code=result.exit_code)

    async def exec(self, message: cri.ExecRequest) -> cri.ExecResponse:
        argv, wanted = convert.command(message.cmd), convert.wanted(message)
        return cri.ExecResponse(url=self._ports.streams.exec(message.container_id, argv, wanted))

    async def attach(self, message: cri.AttachRequest) -> cri.AttachResponse:
        wanted = convert.wanted(message)
        return cri.AttachResponse(url=self._ports.streams.attach(message.container_id, wanted))

    async def port_forward(self, message: cri.PortForwardRequest) -> cri.PortForwardResponse:
        url = self._ports.streams.port_forward(message.pod_sandbox_id, tuple(message.port))
        return cri.PortForwardResponse(url=url)

    async def reopen_container_log(
        self, message: cri.ReopenContainerLogRequest
    ) -> cri.ReopenContainerLogResponse:
        await self._ports.containers.reopen_log(message.container_id)
        return cri.ReopenContainerLogResponse()
