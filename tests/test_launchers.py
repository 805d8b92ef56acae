# SPDX-License-Identifier: Apache-2.0
"""The launchers work on one machine, on two hosts, one of which is cut off, under SLURM (with stand-ins for its
commands) and under accelerate; the files for Kubernetes and SkyPilot match their schemas.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Host, two_hosts, why_no_hosts

pytestmark = [pytest.mark.scripts, pytest.mark.quiet]
ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
RUN = str(ROOT / "tests" / "hosts_run.py")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}
DEADLINE_S = 110.0


def bash(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *arguments],
        env={**os.environ, **ENVIRONMENT, **variables},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def found_in(directory: Path) -> dict[int, dict[str, Any]]:
    return {int(path.stem): json.loads(path.read_text()) for path in directory.glob("*.json")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Train on two ranks of one machine, for comparison."""
    out = tmp_path_factory.mktemp("alone")
    done = bash(str(LAUNCH / "single-node.sh"), RUN, "--steps", "4", "--out", str(out), NPROC="2")
    assert done.returncode == 0, done.stderr
    return found_in(out)


def test_two_ranks_of_one_machine_train_together(alone: dict[int, dict[str, Any]]) -> None:
    assert {rank: report["step"] for rank, report in alone.items()} == {0: 3, 1: 3}
    assert alone[0]["transport"] == "SharedMemoryTransport" and alone[0]["parameters"] == alone[1]["parameters"]


@pytest.mark.parametrize(
    ("script", "variables", "expected"),
    [
        ("single-node.sh", {}, ["found ''", "training script"]),
        ("single-node.sh train.py", {}, ["found 'train.py'"]),
        (f"single-node.sh {RUN}", {"NPROC": "all"}, ["NPROC: found 'all'", "a number of ranks"]),
        (f"single-node.sh {RUN}", {"MAX_RESTARTS": "-1"}, ["MAX_RESTARTS: found '-1'"]),
        (f"multi-node.sh {RUN}", {"RDZV_ENDPOINT": "a:1"}, ["NNODES: found ''", "MIN:MAX"]),
        (f"multi-node.sh {RUN}", {"NNODES": "two", "RDZV_ENDPOINT": "a:1"}, ["NNODES: found 'two'"]),
        (f"multi-node.sh {RUN}", {"NNODES": "2"}, ["RDZV_ENDPOINT: found ''", "HOST:PORT"]),
        (f"multi-node.sh {RUN}", {"NNODES": "2", "RDZV_ENDPOINT": "a"}, ["RDZV_ENDPOINT: found 'a'"]),
    ],
)
def test_missing_or_wrong_settings_are_named(script: str, variables: dict[str, str], expected: list[str]) -> None:
    name, *arguments = script.split()
    done = bash(str(LAUNCH / name), *arguments, **variables)
    assert done.returncode == 2 and all(text in done.stderr for text in expected), done.stderr


DIES_ONCE = """
import os, signal, sys
from datetime import timedelta
import torch, torch.distributed as dist
import shardadam

dist.init_process_group("gloo", timeout=timedelta(seconds=20))
model = torch.nn.Linear(4, 2)
optimizer = shardadam.ShardedAdamW(model.named_parameters())
for _ in range(3):
    model(torch.ones(1, 4)).sum().backward()
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.step()
    optimizer.zero_grad()
sys.stdout.write(f"done after restart {os.environ['TORCHELASTIC_RESTART_COUNT']}\\n")  # in one write: both write
dist.destroy_process_group()
"""


def test_ranks_of_any_script_are_restarted(tmp_path: Path) -> None:
    """Without the variables of settings.sh, the other ranks would wait for the dead one in init_process_group."""
    (tmp_path / "train.py").write_text(DIES_ONCE)
    done = bash(str(LAUNCH / "single-node.sh"), str(tmp_path / "train.py"), NPROC="2", MAX_RESTARTS="1")
    assert done.returncode == 0 and done.stdout.count("done after restart 1") == 2, done.stderr


# Two hosts

_WHY_NO_HOSTS = why_no_hosts()
needs_hosts = pytest.mark.skipif(_WHY_NO_HOSTS is not None, reason=str(_WHY_NO_HOSTS))


def start(host: Host, first: Host, directory: Path, *arguments: str, nproc: int = 1) -> subprocess.Popen[bytes]:
    variables = {
        **ENVIRONMENT,
        "NNODES": "2",
        "NPROC": str(nproc),
        "RDZV_ENDPOINT": f"{first.name}:29517",
        **({"INTERFACE": host.interface, "LOCAL_ADDR": host.address} if nproc > 1 else {}),
    }
    command = ["bash", str(LAUNCH / "multi-node.sh"), RUN, "--out", str(directory), *arguments]
    return host.start(command, variables, directory / f"{host.name}.log")


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def await_step(directory: Path, ranks: int, step: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not (len(found := found_in(directory)) == ranks and all(report["step"] >= step for report in found.values())):
        logs = [path.read_text() for path in directory.glob("*.log")]
        assert time.monotonic() < deadline and not any("Traceback" in log for log in logs), logs
        time.sleep(0.05)


@needs_hosts
@pytest.mark.parametrize("hybrid", [False, pytest.param(True, id="hybrid")])
def test_two_hosts_train_together(hybrid: bool, alone: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    """Over sockets between hosts; with hybrid sharding, over shared memory within each host."""
    options, nproc = (["--hybrid"], 2) if hybrid else ([], 1)
    with two_hosts() as hosts:
        processes = [start(host, hosts[0], tmp_path, "--steps", "4", *options, nproc=nproc) for host in hosts]
        try:
            codes = [process.wait(DEADLINE_S) for process in processes]
        finally:
            end(processes)
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.log")}
    assert codes == [0, 0], logs
    found = found_in(tmp_path)
    assert len(found) == 2 * nproc and all(report["step"] == 3 for report in found.values())
    assert all(report["parameters"] == found[0]["parameters"] for report in found.values())
    if hybrid:
        assert found[0]["transport"] == "HybridTransport" and found[0]["within"] == "SharedMemoryTransport"
    else:
        assert found[0]["transport"] == "GlooTransport"
        assert found[0]["parameters"] == alone[0]["parameters"]


@needs_hosts
@pytest.mark.parametrize("how", ["cable", "killed"])
def test_the_error_names_the_host_that_is_cut_off(how: str, tmp_path: Path) -> None:
    with two_hosts() as (a, b):
        options = ("--steps", "10000", "--pace", "0.02", "--timeout", "4")
        processes = [start(host, a, tmp_path, *options) for host in (a, b)]
        try:
            await_step(tmp_path, 2, 5)
            began = time.monotonic()
            if how == "cable":
                b.cut_off()
            else:
                for child in children_of(processes[1].pid):
                    os.kill(child, signal.SIGKILL)
            code = processes[0].wait(30)
            seconds = time.monotonic() - began
        finally:
            end(processes)
    log = (tmp_path / "host-a.log").read_text()
    assert code != 0 and "RankDesyncError" in log, log
    assert re.search("rank 1 on host-b: " + ("does not answer" if how == "cable" else "has ended"), log), log
    assert seconds < 20, seconds


@needs_hosts
@pytest.mark.parametrize("when", [pytest.param("step", marks=pytest.mark.long), "save"])
def test_a_host_that_loses_the_one_with_the_store_raises(when: str, tmp_path: Path) -> None:
    """A save uses only the store, and a request to a store on a host that is cut off never returns."""
    expected = {"step": "RankDesyncError", "save": "cannot reach the store of the process group"}[when]
    with two_hosts() as (a, b):
        options = ("--steps", "10000", "--pace", "0.02", "--timeout", "4", *(["--save"] if when == "save" else []))
        processes = [start(host, a, tmp_path, *options) for host in (a, b)]
        try:
            await_step(tmp_path, 2, 5)
            a.cut_off()
            (tmp_path / "save").touch()
            deadline = time.monotonic() + 25
            while expected not in (log := (tmp_path / "host-b.log").read_text()):
                assert time.monotonic() < deadline, log
                time.sleep(0.1)
        finally:
            end(processes)
    if when == "step":
        assert "rank 0 on host-a" in log and "rank 1 on host-b (this one)" in log, log


def children_of(pid: int) -> list[int]:
    """Return ``pid`` and all its descendants."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [pid, *(found for child in children for found in children_of(child))]


# SLURM

SRUN = """#!/usr/bin/env bash
# A stand-in for srun: runs the command on two nodes, both of which are this machine.
[[ $1 == --* ]] && shift
"$@" & first=$!
"$@" & second=$!
wait $first && wait $second
"""
SCONTROL = """#!/usr/bin/env bash
case $* in
"show hostnames node[1-2]") printf 'localhost\\nnode2\\n' ;;
"requeue "*) echo "scontrol was asked to $*" ;;
*) exit 1 ;;
esac
"""


def test_slurm_starts_an_agent_on_every_node(tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()
    variables = {
        "PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": str(os.getpid()),
        "NPROC": "1",
    }
    done = bash(str(LAUNCH / "slurm.sbatch"), RUN, "--steps", "2", "--out", str(out), **variables)
    assert done.returncode == 0, done.stderr
    assert sorted(found_in(out)) == [0, 1]
    lost = bash(str(LAUNCH / "slurm.sbatch"), RUN, **{**variables, "SLURM_SUBMIT_DIR": str(tmp_path)})
    assert lost.returncode == 2 and "LAUNCH" in lost.stderr
    (tmp_path / "srun").write_text("#!/usr/bin/env bash\nexit 7\n")
    for after, is_queued_again in (("0", True), ("600", False)):
        failed = bash(str(LAUNCH / "slurm.sbatch"), RUN, **variables, REQUEUE_AFTER=after)
        assert failed.returncode == 7
        assert (f"asked to requeue {os.getpid()}" in failed.stdout) == is_queued_again


# Files


def test_the_kubernetes_file_is_a_valid_train_job() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    found = read_yaml(LAUNCH / "kubernetes.yaml")
    assert models.TrainerV1alpha1TrainJob.from_dict(found).to_dict() == found  # unknown fields would be dropped
    wrong = {**found, "spec": {**found["spec"], "trainer": {"numNodes": "four"}}}
    with pytest.raises(ValueError):
        models.TrainerV1alpha1TrainJob.from_dict(wrong)


def test_the_skypilot_file_is_a_valid_task() -> None:
    sky = pytest.importorskip("sky", reason="skypilot brings a hundred packages, and is not among those of the tests")
    task = sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml"))
    assert task.num_nodes == 2 and "multi-node.sh" in task.run


def test_the_skypilot_file_runs_existing_scripts() -> None:
    found = read_yaml(LAUNCH / "skypilot.yaml")
    assert set(found) == {"name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run"}
    assert "launch/multi-node.sh" in found["run"] and "launch/pretrain.py" in found["run"]


@pytest.mark.parametrize("name", ["cpu", "gpus", "machines"])
def test_accelerate_reads_its_configuration_files(name: str) -> None:
    configs = pytest.importorskip("accelerate.commands.config.config_args")
    found = configs.load_config_from_file(str(LAUNCH / "accelerate" / f"{name}.yaml"))
    assert found.distributed_type == "MULTI_GPU" and found.num_processes in (2, 8, 16)


def test_accelerate_launches_two_ranks_on_cpus(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    done = subprocess.run(
        [*command, str(LAUNCH / "accelerate" / "cpu.yaml"), RUN, "--steps", "2", "--out", str(tmp_path)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(found_in(tmp_path)) == [0, 1]


def read_yaml(path: Path) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(path.read_text())
