# SPDX-License-Identifier: Apache-2.0
"""launch/slurm.sbatch under real SLURM daemons, for two nodes that are both this machine. They come with Debian's
packages slurm-wlm and munge, which CI does not install.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("node1", "node2")
pytestmark = [
    pytest.mark.scripts,
    pytest.mark.quiet,
    pytest.mark.long,
    pytest.mark.skipif(
        not all(map(shutil.which, DAEMONS)) or os.geteuid() != 0, reason=f"needs {', '.join(DAEMONS)}, and root"
    ),
]
TRAINING = [
    "launch/pretrain.py",
    "--steps",
    "1000000",
    "--layers",
    "2",
    "--width",
    "48",
    "--context",
    "32",
    "--validate-every",
    "0",
    "--log-every",
    "500",
    "--sample-bytes",
    "0",
    "--save-every",
    "500",
    "--resume",
    "--save-on-sigterm",
]


class Slurm:
    """A SLURM cluster of two nodes on this machine.

    Args:
        directory: for the cluster's files.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.daemons: list[subprocess.Popen[bytes]] = []
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"{socket.gethostname()}(127.0.0.1)",
            "SlurmctldPort": free_port(),
            "SlurmUser": "root",
            "AuthInfo": f"socket={directory}/munge.socket",
            "StateSaveLocation": directory / "state",
            "SlurmdSpoolDir": directory / "spool.%n",
            "SlurmctldPidFile": directory / "slurmctld.pid",
            "SlurmdPidFile": directory / "slurmd.%n.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "ReturnToService": 2,
            "KillWait": 10,
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        ports = ",".join(str(free_port()) for _ in NODES)
        here = f"NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port=[{ports}]"
        lines.append(f"NodeName={','.join(NODES)} {here}")
        lines += ["PartitionName=all Nodes=ALL Default=YES State=UP", ""]
        (directory / "state").mkdir()
        (directory / "slurm.conf").write_text("\n".join(lines))
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o600)
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.directory}/munge.{name}" for option, name in files.items()]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *options)
        await_(lambda: (self.directory / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D")
        # Ranks look up the name of the first node, so they get their own /etc/hosts.
        hosts = self.directory / "hosts"
        hosts.write_text(f"{Path('/etc/hosts').read_text()}\n127.0.0.1 {' '.join(NODES)}\n")
        for node in NODES:
            start = f"mount --bind {hosts} /etc/hosts && exec slurmd -D -N {node}"
            self._daemon("unshare", "--mount", "sh", "-c", start)
        await_(lambda: self.run("sinfo", "--noheader", "--format=%t %D").strip() == "idle 2", "two nodes")

    def _daemon(self, *command: str) -> None:
        with (self.directory / f"{Path(command[0]).name}.log").open("ab") as log:
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def run(self, *command: str, **variables: str) -> str:
        environment = {**self.environment, **variables}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=30)
        return done.stdout

    def stop(self) -> None:
        self.run("scancel", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            daemon.wait(20)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


def await_(what: Callable[[], bool], name: str, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"{name} did not come within {seconds:.0f} s"
        time.sleep(0.2)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    directory = tmp_path / "slurm"
    directory.mkdir()
    cluster = Slurm(directory)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.timeout(240)
def test_a_job_that_reaches_its_time_limit_saves_is_requeued_and_resumes(slurm: Slurm, tmp_path: Path) -> None:
    checkpoints, log = tmp_path / "checkpoints", tmp_path / "log"
    # SLURM counts in minutes and may signal up to one early: some 10 to 60 s after the job begins.
    options = ["--parsable", "--nodes=2", "--cpus-per-task=1", "--time=2", "--signal=TERM@60", f"--output={log}"]
    command = ["sbatch", *options, "launch/slurm.sbatch", *TRAINING, "--save-dir", str(checkpoints)]
    job = slurm.run(*command, NPROC="1", REQUEUE_AFTER="5").strip()
    assert job.isdigit()

    def logged(pattern: str) -> re.Match[str] | None:
        return re.search(pattern, log.read_text()) if log.exists() else None

    await_(lambda: logged("requeuing the job") is not None, "the end of the job", 120)
    stopped = logged(r"SIGTERM: stopped after step (\d+) ")
    assert stopped is not None and "sharded on 2 x cpu" in log.read_text(), log.read_text()
    await_(lambda: "PENDING" in slurm.run("squeue", "--noheader", "--format=%T", "--job", job), "the queued job")
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    await_(lambda: logged(f"resumed from step {stopped[1]} of") is not None, "the job that goes on", 60)
    slurm.run("scancel", job)
    await_(lambda: not slurm.run("squeue", "--noheader").strip(), "the end of the cancelled job")
