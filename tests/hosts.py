# SPDX-License-Identifier: Apache-2.0
"""Two hosts on one machine: network namespaces with their own host names, joined by a virtual cable that can be cut."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Host:
    """A host: commands run in the namespaces of the process ``pid``."""

    name: str
    address: str
    interface: str
    pid: int

    def command(self, *arguments: str) -> list[str]:
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", *arguments]

    def run(self, *arguments: str) -> None:
        subprocess.run(self.command(*arguments), check=True, capture_output=True, timeout=10)

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> subprocess.Popen[bytes]:
        with output.open("wb") as file:
            return subprocess.Popen(
                self.command(*arguments), env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT
            )

    def cut_off(self) -> None:
        self.run("ip", "link", "set", self.interface, "down")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Create ``host-a`` at 10.77.0.1 and ``host-b`` at 10.77.0.2, which resolve each other's names.

    The namespaces end with the processes that hold them.

    Raises:
        OSError, subprocess.SubprocessError: this machine cannot create them.
    """
    with tempfile.NamedTemporaryFile("w", prefix="shardadam-hosts-") as names:
        names.write("127.0.0.1 localhost\n10.77.0.1 host-a\n10.77.0.2 host-b\n")
        names.flush()
        with _namespaces(names.name) as hosts:
            yield hosts


@contextmanager
def _namespaces(names: str) -> Iterator[tuple[Host, Host]]:
    holders = []
    try:
        for _ in range(2):
            holders.append(
                subprocess.Popen(["unshare", "--net", "--uts", "--mount", "sleep", "600"], stderr=subprocess.DEVNULL)
            )
        own = os.stat("/proc/self/ns/net").st_ino
        for holder in holders:
            deadline = time.monotonic() + 5
            while os.stat(f"/proc/{holder.pid}/ns/net").st_ino == own:
                if holder.poll() is not None or time.monotonic() > deadline:
                    raise OSError("unshare --net --uts --mount is not possible here")
                time.sleep(0.01)
        a, b = (
            Host(f"host-{letter}", f"10.77.0.{number}", f"cable-{letter}", holder.pid)
            for number, (letter, holder) in enumerate(zip("ab", holders, strict=True), 1)
        )
        ends = ["type", "veth", "peer", "name", b.interface, "netns", str(b.pid)]
        subprocess.run(
            ["ip", "link", "add", a.interface, "netns", str(a.pid), *ends], check=True, capture_output=True, timeout=10
        )
        for host in (a, b):
            host.run("hostname", host.name)
            host.run("mount", "--bind", names, "/etc/hosts")
            host.run("ip", "address", "add", f"{host.address}/24", "dev", host.interface)
            host.run("ip", "link", "set", host.interface, "up")
            host.run("ip", "link", "set", "lo", "up")
        yield a, b
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def why_no_hosts() -> str | None:
    """Return why this machine cannot create hosts, or None if it can."""
    try:
        with two_hosts():
            return None
    except (OSError, subprocess.SubprocessError) as error:
        return f"network namespaces cannot be created here: {error}"
