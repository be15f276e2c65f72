"""The sweep before a test run: what a killed run has recorded goes, what a living one has stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import runs
from tests.agentkit import REPOSITORY, processes_with
from tests.shimkit import until

RUN = """
import os, subprocess, sys, time
from pathlib import Path
from tests import runs
from tests.netkit import Network
base = Path(sys.argv[1])
runs.record("folder", str(base))
runs.record("cgroup", sys.argv[2])
network = Network(base)
subprocess.run(["ip", "link", "add", network.bridge, "type", "bridge"], check=True)
for program, address in (("iptables", "192.0.2.1"), ("ip6tables", "2001:db8::1")):
    rule = [program, "-w", "-t", "nat", "-A", "POSTROUTING", "-d", address]
    subprocess.run([*rule, "-m", "comment", "--comment", f'name: "{network.name}"', "-j", "RETURN"], check=True)
top = next(p for p in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")) if p.is_dir()) / sys.argv[2]
(top / "below").mkdir(parents=True)
apart = {"start_new_session": True, "stdout": subprocess.DEVNULL}
sleeper = subprocess.Popen(["sleep", "1000"], **apart)
(top / "below/cgroup.procs").write_text(str(sleeper.pid))
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", f"{base}/config"], **apart)
subprocess.run(["mount", "-t", "tmpfs", "test", base], check=True)
print(network.ident, sleeper.pid, flush=True)
time.sleep(1000)
"""


@pytest.fixture
def own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Other runs' are not this test's to sweep."""
    monkeypatch.setattr(runs, "RECORDS", tmp_path / "records")
    return tmp_path / "records"


def saved() -> str:
    programs = ("iptables-save", "ip6tables-save")
    return "".join(subprocess.run([p], capture_output=True, text=True, check=True).stdout for p in programs)


def test_a_killed_run_is_undone_and_a_living_one_is_not(own_records: Path, tmp_path: Path) -> None:
    base, cgroup = tmp_path / "base", f"hyperpod-test-{os.getpid()}-runs"
    base.mkdir()
    script = (
        f"from pathlib import Path\nfrom tests import runs\nruns.RECORDS = Path({str(own_records)!r})\n{RUN}"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", script, str(base), cgroup], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert run.stdout is not None
    ident, sleeper = run.stdout.readline().split()
    bridge = Path(f"/sys/class/net/hpt{ident}")
    assert bridge.exists() and saved().count(f"test-{ident}") == 2
    assert runs.sweep() == []
    assert bridge.exists() and Path(f"/proc/{sleeper}").exists()

    run.send_signal(signal.SIGKILL)
    run.communicate()
    undone = runs.sweep()
    assert sorted(undone) == sorted([f"folder {base}", f"cgroup {cgroup}", f"network {ident}"])
    assert not bridge.exists()
    assert f"test-{ident}" not in saved()
    assert not base.exists() and str(base) not in Path("/proc/mounts").read_text()
    until(lambda: processes_with(f"{base}/config") == [])  # killed they are, and go in a moment
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{cgroup}"))
    assert runs.sweep() == [] and list(own_records.iterdir()) == []
