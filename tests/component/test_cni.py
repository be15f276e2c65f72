"""Namespaces and plugins: Debian's own, and ones that fail, hang, die and print nonsense."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hyperpod import processes
from hyperpod.config import NetworkConfig
from hyperpod.errors import NetworkError
from hyperpod.model.network import Attachment
from hyperpod.model.sandbox import PortMapping
from hyperpod.netlink import Netlink
from hyperpod.network import links, ports
from hyperpod.network.cni import Cni
from hyperpod.network.confdir import ConfDir
from hyperpod.network.hostdns import host_resolv_conf
from hyperpod.network.netns import Namespaces
from hyperpod.network.process import MAX_STDOUT, run
from hyperpod.sandbox.network import PodNetworks
from tests.netkit import Network, free_port
from tests.shimkit import eventually

ROOT = Path(__file__).parent.parent.parent
PLUGINS = Path("/usr/lib/cni")
POD = "ab" * 32
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces are root's")


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    one = Network(tmp_path)
    yield one
    one.destroy()


@pytest.fixture
async def namespaces(tmp_path: Path) -> AsyncIterator[Namespaces]:
    one = Namespaces(tmp_path / "run")
    yield one
    for short in one.known():
        await one.remove(short)


def caller(network: Network, *bin_dirs: Path, timeout: float = 60.0) -> Cni:
    return Cni(ConfDir(network.conf_dir, bin_dirs or (PLUGINS,)), timeout, network.conf_dir.parent / "notes")


def attachment(network: Network, netns: Path, **more: str) -> Attachment:
    text = network.file.read_text()
    values = {"source": str(network.file), "conflist": text, "container_id": POD, "netns": str(netns)}
    return Attachment(**{**values, **more})


def host_links() -> set[str]:
    with Netlink() as netlink:
        return {link.name for link in netlink.links()}


# -- namespaces ---------------------------------------------------------------------------------------------


async def test_a_namespace_is_pinned_and_ours_stays_ours(namespaces: Namespaces) -> None:
    before = Path("/proc/self/ns/net").stat().st_ino
    path = await namespaces.make(POD)
    assert namespaces.alive(str(path)) and path.stat().st_ino != before
    assert Path("/proc/self/ns/net").stat().st_ino == before

    def look() -> list[tuple[str, int]]:
        with Netlink() as netlink:
            return [(link.name, link.flags & 1) for link in netlink.links()]

    assert await namespaces.run(path, look) == [("lo", 1)]
    assert len(look()) > 1
    await namespaces.remove(POD)
    assert not path.exists() and not namespaces.alive(str(path))
    assert str(path) not in Path("/proc/mounts").read_text()
    await namespaces.remove(POD)


async def test_a_namespace_left_over_is_replaced(namespaces: Namespaces) -> None:
    first = (await namespaces.make(POD)).stat().st_ino
    await namespaces.make(POD)
    assert Path("/proc/mounts").read_text().count(str(namespaces.path(POD))) == 1
    with pytest.raises(NetworkError, match="No such file"):
        await namespaces.run(namespaces.path("cd" * 32), lambda: None)
    assert first


async def test_an_error_inside_comes_out(namespaces: Namespaces) -> None:
    path = await namespaces.make(POD)

    def fail() -> None:
        raise OSError(5, "it broke")

    with pytest.raises(NetworkError, match="it broke"):
        await namespaces.run(path, fail)


# -- real plugins -------------------------------------------------------------------------------------------


async def test_add_and_delete_with_debian_s_plugins(network: Network, namespaces: Namespaces) -> None:
    cni = caller(network)
    path = await namespaces.make(POD)
    runtime = {
        "portMappings": [{"hostPort": 31999, "containerPort": 80, "protocol": "tcp"}],
        "bandwidth": {"ingressRate": 10**7, "ingressBurst": 10**7, "egressRate": 10**7, "egressBurst": 10**7},
    }
    done, result = await cni.add(attachment(network, path, runtime=json.dumps(runtime)))
    assert result.addresses("eth0") == (f"{network.v4}.2", f"{network.v6}:2")
    [interface] = await namespaces.run(path, lambda: links.read_interfaces(POD))
    assert (interface.name, interface.mtu, interface.tap) == ("eth0", 1500, f"hp{POD[:12]}0")
    assert interface.addresses == (f"{network.v4}.2/24", f"{network.v6}:2/64")
    assert [interface.mac] == [x.mac for x in result.interfaces if x.name == "eth0"]
    assert {(route.destination, route.gateway) for route in interface.routes} == {
        ("0.0.0.0/0", f"{network.v4}.1"),
        ("::/0", f"{network.v6}:1"),
        (f"{network.v4}.0/24", ""),
        (f"{network.v6}:/64", ""),
    }
    assert any("31999" in line for line in network.leftovers(patience=0)), "the leak check sees rules"
    await namespaces.run(path, lambda: subprocess.run(["ip", "link", "set", "eth0", "down"], check=True))
    with pytest.raises(NetworkError, match="no interface that is up"):
        await namespaces.run(path, lambda: links.read_interfaces(POD))
    await cni.delete(done, netns=str(path))
    await cni.delete(done, netns="")
    await namespaces.remove(POD)
    assert network.leftovers() == []
    made = {x.name for x in result.interfaces if not x.sandbox}
    assert len(made) == 3, "bridge, the link's end, and bandwidth's own"
    assert made & host_links() == {network.bridge}


async def test_delete_after_the_namespace_is_gone_frees_the_address(
    network: Network, namespaces: Namespaces
) -> None:
    cni = caller(network)
    done, _ = await cni.add(attachment(network, await namespaces.make(POD)))
    await namespaces.remove(POD)
    assert network.leftovers(patience=0) != []
    await cni.delete(done, netns="")
    assert network.leftovers() == []


async def test_delete_uses_what_add_used(network: Network, namespaces: Namespaces) -> None:
    cni = caller(network)
    path = await namespaces.make(POD)
    done, _ = await cni.add(attachment(network, path))
    network.file.write_text("{")
    await cni.delete(done, netns=str(path))
    assert network.leftovers() == []


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0"])
async def test_versions_that_debian_s_plugins_speak(
    network: Network, namespaces: Namespaces, version: str
) -> None:
    # Not bandwidth: its CHECK (1.1.1) panics when the pod has no limit.
    network.write(
        network.bridge_plugin(), {"type": "portmap", "capabilities": {"portMappings": True}}, version=version
    )
    cni = caller(network)
    path = await namespaces.make(POD)
    done, result = await cni.add(attachment(network, path))
    assert len(result.addresses("eth0")) == 2
    await cni.check(done)
    await cni.delete(done, netns=str(path))
    assert network.leftovers() == []


async def test_a_version_that_they_do_not_speak_is_told(network: Network, namespaces: Namespaces) -> None:
    network.write(version="1.1.0")
    cni = caller(network)
    with pytest.raises(NetworkError, match=r"bridge of network test-.*incompatible CNI versions"):
        await cni.add(attachment(network, await namespaces.make(POD)))


async def test_an_address_pool_that_is_used_up(network: Network, namespaces: Namespaces) -> None:
    bridge = network.bridge_plugin(dual=False)
    bridge["ipam"]["ranges"] = [[{"subnet": f"{network.v4}.0/30"}]]
    network.write(bridge)
    cni = caller(network)
    one = attachment(network, await namespaces.make(POD))
    one, _ = await cni.add(one)
    other = attachment(network, await namespaces.make("cd" * 32), container_id="cd" * 32)
    with pytest.raises(NetworkError, match=r"CNI plugin bridge of network test-.* \(ADD\) failed: .*no IP"):
        await cni.add(other)
    await cni.delete(other, netns=other.netns)
    await cni.delete(one, netns=one.netns)
    await cni.add(other)
    await cni.delete(other, netns=other.netns)
    assert network.leftovers() == []


# -- plugins that fail --------------------------------------------------------------------------------------

RESULT = '{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.9/24"}]}'


def plugin(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ('cat >/dev/null; echo \'{"code":7,"msg":"no such vlan"}\'; exit 1', r"\(ADD\) failed: no such vlan"),
        ("echo 'it broke' >&2; exit 3", r"failed: it broke"),
        ("exit 3", r"failed with exit code 3"),
        ("kill -9 $$", r"was killed by signal 9"),
        ("echo nonsense", r"not JSON"),
        ("", r"printed no result"),
        ("echo '[]'", r"not a JSON object"),
        ('echo \'{"ips":[{"address":"x"}]}\'', r"address 0 is 'x'"),
        ("exec yes", r"printed more than 1048576 bytes"),
        ("exec sleep 100", r"did not end within 0.5 s"),
        ("sleep 100 & exec sleep 100", r"did not end within 0.5 s"),
    ],
)
async def test_a_plugin_that_fails_is_named_with_its_words(
    network: Network, tmp_path: Path, script: str, why: str
) -> None:
    plugin(tmp_path / "bin", "broken", script)
    network.write({"type": "broken"})
    timeout = 0.5 if "0.5 s" in why else 60
    with pytest.raises(NetworkError, match="broken") as info:
        await caller(network, tmp_path / "bin", timeout=timeout).add(attachment(network, tmp_path))
    assert info.match(why)
    assert str(tmp_path / "bin") not in "".join(commands()), "nothing of it runs on"


def commands() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text(errors="replace"))
        except OSError:
            continue
    return found


async def test_a_grandchild_that_keeps_the_pipes_does_not_hold_us_up() -> None:
    script = f"setsid sleep 15 & echo '{RESULT}'"
    start = time.monotonic()
    done = await run(["sh", "-c", script], what="x", stdin=b"", env=dict(os.environ), timeout=20)
    assert done.stdout.decode().strip() == RESULT
    assert time.monotonic() - start < 14
    assert len(done.stdout) < MAX_STDOUT


async def test_a_result_as_large_as_one_may_be_is_given_back(network: Network, tmp_path: Path) -> None:
    """Written down it is larger: spaces, and escapes for what is not ASCII."""
    (tmp_path / "result").write_text(
        f'{RESULT[:-1]},"more":[{",".join(["0"] * 300_000)}],"é":"{"é" * 50_000}"}}'
    )
    plugin(
        tmp_path / "bin", "large", f'[ "$CNI_COMMAND" = DEL ] && cat >{tmp_path}/del || cat {tmp_path}/result'
    )
    network.write({"type": "large"})
    cni = caller(network, tmp_path / "bin")
    done, _ = await cni.add(attachment(network, tmp_path))
    await cni.check(done)
    await cni.delete(done, netns="")
    assert json.loads((tmp_path / "del").read_bytes())["prevResult"] == json.loads(done.result)


async def killed_while(network: Network, tmp_path: Path, call: str) -> None:
    """SIGKILL for a process that does `call` of a Cni, when its plugin has made the file `began`."""
    script = (
        "import asyncio, sys; from tests.component.test_cni import *; from tests.netkit import *\n"
        f"conf = ConfDir(Path({str(network.conf_dir)!r}), [Path({str(tmp_path / 'bin')!r})])\n"
        f"one = Attachment.model_validate_json({attachment(network, tmp_path).model_dump_json()!r})\n"
        f"asyncio.run(Cni(conf, 60, Path({str(network.conf_dir.parent / 'notes')!r})).{call})"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) as daemon:
        while not (tmp_path / "began").exists():
            assert daemon.poll() is None
            await asyncio.sleep(0.02)
        daemon.kill()


async def test_an_add_ends_with_the_daemon_that_called_it(network: Network, tmp_path: Path) -> None:
    seconds = f"30.{os.getpid()}"
    plugin(tmp_path / "bin", "slow", f"touch {tmp_path}/began; exec sleep {seconds}")
    network.write({"type": "slow"})
    await killed_while(network, tmp_path, "add(one)")
    await eventually(lambda: not any(f"sleep\x00{seconds}" in line for line in commands()), 20)


@pytest.mark.parametrize("end", ["killed", "cancelled"])
async def test_a_delete_is_not_cut_in_two(network: Network, tmp_path: Path, end: str) -> None:
    """It goes on without the daemon that called it, and the next one's waits for it."""
    os.mkfifo(tmp_path / "go")
    calls = tmp_path / "calls"
    script = f"echo begin >>{calls}; touch {tmp_path}/began; cat {tmp_path}/go; echo end >>{calls}"
    plugin(tmp_path / "bin", "slow", script)
    network.write({"type": "slow"})
    one, cni = attachment(network, tmp_path), caller(network, tmp_path / "bin")
    if end == "killed":
        await killed_while(network, tmp_path, "delete(one, netns='')")
    else:
        first = asyncio.create_task(cni.delete(one, netns=""))
        await eventually((tmp_path / "began").exists)
        first.cancel()
        await asyncio.wait([first])
    again = asyncio.create_task(cni.delete(one, netns=""))
    for ends in (1, 2):
        await eventually(lambda: opened(tmp_path / "go"))
        await eventually(lambda ends=ends: calls.read_text().count("end") == ends)
    await again
    assert calls.read_text().split() == ["begin", "end", "begin", "end"]
    assert list(cni.notes.iterdir()) == []


def opened(fifo: Path) -> bool:
    """Whether somebody reads from it, who gets its end then."""
    try:
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


async def test_a_delete_that_was_left_and_hangs_is_killed(network: Network, tmp_path: Path) -> None:
    script = (
        f"[ -e {tmp_path}/began ] && exit; echo $$ >{tmp_path}/pid; touch {tmp_path}/began; exec sleep 100"
    )
    plugin(tmp_path / "bin", "slow", script)
    network.write({"type": "slow"})
    await killed_while(network, tmp_path, "delete(one, netns='')")
    pid = int((tmp_path / "pid").read_text())
    await caller(network, tmp_path / "bin", timeout=0.5).delete(attachment(network, tmp_path), netns="")
    assert not processes.running_since(pid)


async def test_the_order_of_calls_and_what_each_is_given(network: Network, tmp_path: Path) -> None:
    record = tmp_path / "calls"
    for name in ("one", "two"):
        plugin(
            tmp_path / "bin",
            name,
            f'echo "$CNI_COMMAND {name} $CNI_IFNAME $CNI_NETNS $CNI_ARGS" $(cat) >> {record}; '
            f'echo \'{{"cniVersion":"1.1.0","ips":[{{"address":"10.0.0.9/24"}}],"dns":{{"domain":"{name}"}}}}\'',
        )
    network.write({"type": "one"}, {"type": "two"}, version="1.1.0")
    cni = caller(network, tmp_path / "bin")
    await cni.status()
    done, result = await cni.add(attachment(network, Path("/ns"), args="A=b"))
    await cni.check(done)
    await cni.delete(done, netns="")
    lines = record.read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["STATUS", "one"],
        ["STATUS", "two"],
        ["ADD", "one"],
        ["ADD", "two"],
        ["CHECK", "one"],
        ["CHECK", "two"],
        ["DEL", "two"],
        ["DEL", "one"],
    ]
    given = [json.loads(line[line.index("{") :]) for line in lines]
    assert [document.get("prevResult", {}).get("dns", {}).get("domain") for document in given] == [
        None, None, None, "one", "two", "two", "two", "two",
    ]  # fmt: skip
    assert lines[2].startswith("ADD one eth0 /ns A=b {")
    assert lines[-1].startswith("DEL one eth0  A=b {"), "the namespace is gone"
    assert result.dns.domain == "two"


async def test_a_plugin_that_is_not_ready_says_why(network: Network, tmp_path: Path) -> None:
    plugin(tmp_path / "bin", "one", 'echo \'{"code":50,"msg":"no lease server"}\'; exit 1')
    network.write({"type": "one"}, version="1.1.0")
    with pytest.raises(NetworkError, match="no lease server"):
        await caller(network, tmp_path / "bin").status()


# -- the configuration folder -------------------------------------------------------------------------------


def test_the_first_file_decides_and_is_read_again(network: Network, tmp_path: Path) -> None:
    conf = caller(network).conf
    assert conf.current().name == network.name
    (network.conf_dir / "05-first.conf").write_text('{"cniVersion":"1.0.0","name":"first","type":"ptp"}')
    assert conf.current().name == "first"
    (network.conf_dir / "05-first.conf").write_text('{"cniVersion":"1.0.0","name":"fi')
    with pytest.raises(NetworkError, match=r"05-first.conf: not JSON.*mend or remove this file"):
        conf.current()
    (network.conf_dir / "05-first.conf").unlink()
    os.mkfifo(network.conf_dir / "05-first.conf")
    with pytest.raises(NetworkError, match=r"05-first.conf: not a file; remove it"):
        conf.current()
    (network.conf_dir / "05-first.conf").unlink()
    (network.conf_dir / "00-notes.txt").write_text("not a configuration")
    (network.conf_dir / "00-old.conflist").mkdir()
    assert conf.current().name == network.name
    network.file.unlink()
    with pytest.raises(NetworkError, match=rf"no CNI network: {network.conf_dir}"):
        conf.current()
    with pytest.raises(NetworkError, match="no CNI network"):
        ConfDir(tmp_path / "nowhere", ()).current()


def test_a_missing_plugin_is_named_until_it_is_there(network: Network, tmp_path: Path) -> None:
    network.write({"type": "mine", "ipam": {"type": "addresses"}})
    conf = caller(network, tmp_path / "a", tmp_path / "bin").conf
    for name in ("mine", "addresses"):
        with pytest.raises(NetworkError, match=rf"'{name}'.*{tmp_path}/a, {tmp_path}/bin"):
            conf.current()
        plugin(tmp_path / "bin", name, "")
    assert [p.type for p in conf.current().plugins] == ["mine"]


async def test_a_template_becomes_the_network(network: Network, tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.write_text(network.file.read_text().replace(f"{network.v4}.0/24", "{{.PodCIDR}}"))
    config = NetworkConfig(conf_dir=tmp_path / "other", bin_dirs=(PLUGINS,), conf_template=template)
    networks = PodNetworks(config, tmp_path / "run", lambda ident: tmp_path / ident)
    await networks.use_pod_cidr("")
    with pytest.raises(NetworkError, match="no CNI network"):
        await networks.cni.status()
    for cidr in ("10.7.0.0/24", "10.8.0.0/24"):
        await networks.use_pod_cidr(cidr)
        assert cidr in (await networks.cni.status()).text
    (tmp_path / "other" / "00-add-on.conflist").write_text(network.file.read_text())
    await networks.use_pod_cidr("10.9.0.0/24")
    assert "10.8.0.0" in (tmp_path / "other" / "10-hyperpod-net.conflist").read_text(), "not ours to change"


# -- the rest -----------------------------------------------------------------------------------------------


def test_ports_of_the_host() -> None:
    port = free_port()  # nobody is given this one when it is free again
    with socket.create_server(("127.0.0.1", port)):
        for ip in ("", "127.0.0.1"):
            with pytest.raises(NetworkError, match=rf"{port}/TCP is in use by a process"):
                ports.need_free([PortMapping(host_port=port, container_port=1, host_ip=ip)])
        ports.need_free([PortMapping(host_port=port, container_port=1, protocol="UDP")])
        ports.need_free([PortMapping(host_port=port, container_port=1, protocol="SCTP")])
    ports.need_free([PortMapping(host_port=port, container_port=1)])
    with pytest.raises(NetworkError, match="no such address"):
        ports.need_free([PortMapping(host_port=port, container_port=1, host_ip="192.0.2.1")])


def test_the_host_s_resolv_conf(tmp_path: Path) -> None:
    path, behind = tmp_path / "resolv.conf", tmp_path / "systemd"
    assert host_resolv_conf(path, behind) == ""
    path.write_text("nameserver 127.0.0.53\n")
    assert host_resolv_conf(path, behind) == "nameserver 127.0.0.53\n", "better than nothing"
    behind.write_text("nameserver 10.0.0.1\n")
    assert host_resolv_conf(path, behind) == "nameserver 10.0.0.1\n"
    path.write_text("nameserver 10.9.9.9\n")
    assert host_resolv_conf(path, behind) == "nameserver 10.9.9.9\n"


async def shell(path: Path, script: str) -> str:
    """A shell inside a namespace; gives its output."""
    done = await run(
        ["nsenter", f"--net={path}", "sh", "-ec", script],
        what=script,
        stdin=b"",
        env=dict(os.environ),
        timeout=20,
    )
    assert done.code == 0, done.stderr
    return done.stdout.decode()
