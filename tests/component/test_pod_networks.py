"""A sandbox's network from record to nothing, with Debian's plugins and no VM."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hyperpod.config import NetworkConfig
from hyperpod.errors import NetworkError
from hyperpod.model.network import Attachment
from hyperpod.model.sandbox import SandboxRecord
from hyperpod.sandbox.network import CHECKS_AT_ONCE, FILE, PodNetworks
from tests.component.test_cni import PLUGINS, RESULT, plugin
from tests.netkit import Network
from tests.unit.test_convert import sandbox

IDENT = "ab" * 32


@pytest.fixture
async def network(tmp_path: Path) -> AsyncIterator[Network]:
    one = Network(tmp_path)
    yield one
    one.destroy()


@pytest.fixture
async def networks(tmp_path: Path, network: Network) -> AsyncIterator[PodNetworks]:
    config = NetworkConfig(conf_dir=network.conf_dir, bin_dirs=(PLUGINS, tmp_path / "bin"), plugin_timeout=20)
    (tmp_path / IDENT).mkdir()
    one = PodNetworks(config, tmp_path / "run", lambda ident: tmp_path / ident)
    yield one
    await one.sweep([])


@pytest.fixture
def record() -> SandboxRecord:
    return sandbox(IDENT).record


async def test_attached_and_detached(
    tmp_path: Path, network: Network, networks: PodNetworks, record: SandboxRecord
) -> None:
    found = await networks.attach(record)
    assert found.addresses == (f"{network.v4}.2", f"{network.v6}:2")
    written = Attachment.model_validate_json((tmp_path / IDENT / FILE).read_bytes())
    assert written.conflist == network.file.read_text() and written.result
    assert "K8S_POD_NAME=web" in written.args
    for _ in range(2):
        await networks.detach(IDENT)
        assert network.leftovers() == [] and networks.namespaces.known() == []
        assert not (tmp_path / IDENT / FILE).exists()


async def test_an_add_of_which_the_result_is_not_known_is_undone(
    tmp_path: Path, network: Network, networks: PodNetworks, record: SandboxRecord
) -> None:
    await networks.attach(record)
    file = tmp_path / IDENT / FILE
    written = Attachment.model_validate_json(file.read_bytes())
    file.write_text(written.model_copy(update={"result": ""}).model_dump_json())
    await networks.detach(IDENT)
    assert network.leftovers() == []


async def test_rules_of_a_plugin_before_the_one_that_fails(
    tmp_path: Path, network: Network, networks: PodNetworks, record: SandboxRecord
) -> None:
    """The firewall plugin's DEL does nothing without a result."""
    plugin(tmp_path / "bin", "broken", '[ "$CNI_COMMAND" = DEL ]')
    network.write(network.bridge_plugin(), {"type": "firewall"}, {"type": "broken"})
    with pytest.raises(NetworkError, match=r"broken of network .* \(ADD\) failed"):
        await networks.attach(record)
    assert sum("CNI-FORWARD" in line for line in network.leftovers(patience=0)) == 4
    await networks.detach(IDENT)
    assert network.leftovers() == []


@pytest.mark.parametrize("mend", ["mended", "taken out"])
async def test_a_configuration_of_which_add_and_delete_fail(
    tmp_path: Path, network: Network, networks: PodNetworks, record: SandboxRecord, mend: str
) -> None:
    """Here host-local's and then bandwidth's: a DEL after the mend is of what is there then."""
    good, bad = network.bridge_plugin(), network.bridge_plugin()
    bad["ipam"]["ranges"] = [[{"subnet": f"{network.v4}.0/33"}]]
    broken = {"type": "bandwidth", "ingressRate": 1000}  # and no burst
    for plugins in ([bad], [good, broken]):
        network.write(*plugins)
        with pytest.raises(NetworkError, match=r"\(ADD\) failed"):
            await networks.attach(record)
        with pytest.raises(NetworkError, match=r"\(DEL\) failed"):
            await networks.detach(IDENT)
        network.write(good, *([{"type": "bandwidth"}] if mend == "mended" else []))
        await networks.detach(IDENT)
        assert network.leftovers() == [] and networks.namespaces.known() == []


async def test_a_plugin_that_was_added_leaves_by_what_added_it(
    tmp_path: Path, network: Network, networks: PodNetworks, record: SandboxRecord
) -> None:
    """Whatever the configuration is by then: another one might know nothing of what the plugin holds."""
    plugin(
        tmp_path / "bin", "once", f"[ $CNI_COMMAND = ADD ] || exec test -e {tmp_path}/mended; echo '{RESULT}'"
    )
    network.write({"type": "once"})
    await networks.attach(record, vm=False)
    network.write({"type": "once", "other": 1})
    with pytest.raises(NetworkError, match=r"\(DEL\) failed"):
        await networks.detach(IDENT)
    (tmp_path / "mended").touch()
    await networks.detach(IDENT)


async def test_a_record_that_was_set_aside(
    tmp_path: Path, network: Network, networks: PodNetworks, record: SandboxRecord
) -> None:
    await networks.attach(record)
    shutil.move(tmp_path / IDENT, tmp_path / "aside")
    await networks.detach(IDENT, tmp_path / "aside")
    assert network.leftovers() == [] and networks.namespaces.known() == []


async def test_checks_after_a_restart_leave_room_for_others(
    tmp_path: Path, network: Network, networks: PodNetworks, record: SandboxRecord
) -> None:
    now = tmp_path / "now"
    now.mkdir()
    script = (
        f"[ \"$CNI_COMMAND\" = CHECK ] || exec echo '{RESULT}'; touch {now}/$$; "
        f"ls {now} | wc -l >> {tmp_path}/many; sleep 0.1; rm {now}/$$"
    )
    plugin(tmp_path / "bin", "slow", script)
    network.write({"type": "slow"})
    await networks.attach(record, vm=False)
    await asyncio.gather(*(networks.check(IDENT) for _ in range(8)))
    many = [int(line) for line in (tmp_path / "many").read_text().split()]
    assert len(many) == 8 and max(many) <= CHECKS_AT_ONCE
    await networks.detach(IDENT)


async def test_a_damaged_file_keeps_nobody_from_stopping(
    tmp_path: Path, networks: PodNetworks, record: SandboxRecord, caplog: pytest.LogCaptureFixture
) -> None:
    await networks.attach(record)
    (tmp_path / IDENT / FILE).write_text("{")
    await networks.detach(IDENT)
    assert networks.namespaces.known() == []
    assert f"{FILE} is damaged" in caplog.text


async def test_no_address_is_an_error(
    tmp_path: Path, network: Network, networks: PodNetworks, record: SandboxRecord
) -> None:
    plugin(tmp_path / "bin", "none", "echo '{}'")
    network.write({"type": "none"})
    with pytest.raises(NetworkError, match=r"gave eth0 no address"):
        await networks.attach(record)
    await networks.detach(IDENT)
    assert networks.namespaces.known() == []


async def test_capabilities_that_nobody_has_are_logged(
    tmp_path: Path, network: Network, networks: PodNetworks, caplog: pytest.LogCaptureFixture
) -> None:
    network.write(network.bridge_plugin())
    limited = sandbox(IDENT, annotations={"kubernetes.io/ingress-bandwidth": "1M"}).record
    await networks.attach(limited)
    await networks.detach(IDENT)
    assert "asks for bandwidth, which no plugin" in caplog.text
