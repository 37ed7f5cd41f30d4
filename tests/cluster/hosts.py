"""Hosts on one machine: network namespaces with names and addresses, joined by a switch that can cut one off.

Needs root and iproute2. Addresses are within the namespaces alone, which go when the test ends.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

needs_hosts = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None,
    reason="making hosts takes root, iproute2 and util-linux",
)

_ENTER = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


@dataclass
class Hosts:
    """Hosts `host0`, `host1`, ... at 10.77.0.1, 10.77.0.2, ..., as long as `hosts` lasts."""

    folder: Path
    count: int
    prefix: str = field(default_factory=lambda: f"hr{os.getpid()}")
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, host: int, command: list[str], told: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command on a host, which writes to a file."""
        enter = ["unshare", "--uts", "--mount", "sh", "-ec", _ENTER, "sh", f"host{host}", str(self.folder / "hosts")]
        with told.open("w") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", f"{self.prefix}-{host}", *enter, *command],
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def cut(self, host: int) -> None:
        """Cut a host off: what it sends is lost, and nobody is told."""
        _ip("-n", f"{self.prefix}-net", "link", "set", f"port{host}", "nomaster")


@contextmanager
def hosts(count: int, folder: Path) -> Iterator[Hosts]:
    """So many hosts, which can reach one another; what they run ends with the block."""
    made = Hosts(folder, count)
    names = "".join(f"10.77.0.{host + 1} host{host}\n" for host in range(count))
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    switch, spaces = f"{made.prefix}-net", [f"{made.prefix}-{host}" for host in range(count)]
    try:
        for space in (switch, *spaces):
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for host, space in enumerate(spaces):
            port = f"port{host}"
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("-n", switch, "link", "set", port, "up", "master", "switch")
            _ip("-n", space, "addr", "add", f"10.77.0.{host + 1}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
        yield made
    finally:
        for process in made.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for space in (*spaces, switch):
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)


def await_(what: Callable[[], bool], seconds: float, told: Callable[[], str]) -> float:
    """Wait until something is so; how long it took."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds, told()
        time.sleep(0.1)
    return time.monotonic() - began


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
