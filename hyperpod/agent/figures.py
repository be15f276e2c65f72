"""The kernel's text files of figures, as numbers: pure, and blind to lines that are none of theirs."""

from __future__ import annotations

from hyperpod.api.gen.hyperpod.agentstats import v1

NANO = 10**9
UNLIMITED = 1 << 62
"""cgroup v1 writes "no limit" as a number just below 2^63."""


def flat(text: str) -> dict[str, int]:
    """`name 5` per line: cpu.stat, memory.stat, memory.events; `name: 5 kB` of /proc/meminfo too."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition(" ")
        value = rest.split()[:1]
        if value and value[0].isdecimal():
            found[name.removesuffix(":")] = int(value[0])
    return found


def limit(text: str) -> int:
    """A limit file; 0 for "max", and for what v1 writes instead."""
    text = text.strip()
    value = int(text) if text.isdecimal() else 0
    return value if value < UNLIMITED else 0


def pressure(text: str) -> v1.Pressure | None:
    """`some avg10=0.12 avg60=… avg300=… total=MICROSECONDS`, and a line `full`."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        for pair in rest.split():
            name, _, value = pair.partition("=")
            if name == "total" and value.isdecimal():
                found[f"{kind}_total_ns"] = int(value) * 1000
            elif value.replace(".", "", 1).isdecimal():
                found[f"{kind}_{name}"] = round(float(value) * 100)
    known = {name: value for name, value in found.items() if name in v1.Pressure.__dataclass_fields__}
    return v1.Pressure(**known) if known else None


def io_stat(text: str) -> dict[str, int]:
    """rbytes, wbytes, rios and wios of io.stat, all devices together."""
    sums: dict[str, int] = {}
    for line in text.splitlines():
        for pair in line.split()[1:]:
            name, _, value = pair.partition("=")
            if value.isdecimal():
                sums[name] = sums.get(name, 0) + int(value)
    return sums


def busy_ns(text: str, ticks_per_second: int) -> int:
    """CPU time that was not idle, of all CPUs: the first line of /proc/stat (proc(5)); guest time is in user."""
    fields = text.partition("\n")[0].split()[1:9]
    if len(fields) < 8 or not all(field.isdecimal() for field in fields):
        return 0
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) * (NANO // ticks_per_second)


def interfaces(text: str) -> list[v1.InterfaceStats]:
    """/proc/net/dev without the loopback interface, and without those that a container gave a name that is not
    ASCII: Linux takes nearly any byte."""
    found = []
    for line in text.splitlines()[2:]:
        before, _, rest = line.rpartition(":")
        name, fields = before.strip(), rest.split()
        if name == "lo" or len(fields) < 16 or not all(field.isdecimal() for field in fields):
            continue
        if not (name.isascii() and name.isprintable()):
            continue
        n = [int(field) for field in fields]
        found.append(
            v1.InterfaceStats(
                name=name,
                rx_bytes=n[0],
                rx_packets=n[1],
                rx_errors=n[2],
                rx_dropped=n[3],
                tx_bytes=n[8],
                tx_packets=n[9],
                tx_errors=n[10],
                tx_dropped=n[11],
            )
        )
    return found


def soft_limit(text: str, name: str) -> int:
    """A line of /proc/PID/limits; 0 for unlimited and for none."""
    for line in text.splitlines():
        if line.startswith(name):
            value = line[len(name) :].split()[:1]
            return int(value[0]) if value and value[0].isdecimal() else 0
    return 0
