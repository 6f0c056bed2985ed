"""A sweep on a real SLURM cluster of one node, whose jobs own their workers."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

CONFIGURATION = Path("/etc/slurm/slurm.conf")  # the executor forgets SLURM_CONF, so it must be where SLURM looks
DAEMONS = ("munged", "slurmctld", "slurmd")
FLAGS = (
    *("--workflow-profile", "profiles/slurm", "--set-threads", "benchmark=2", "--default-resources", "mem_mb=1000"),
    *("--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "2"),
    *("--seconds-between-status-checks", "2"),
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster of this machine alone, started by hand: no systemd, no accounting. Needs root and Debian."""
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="pip install -e '.[slurm]'")
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons are started by root")
    if CONFIGURATION.exists():
        pytest.skip(f"{CONFIGURATION} is there: this machine has a cluster of its own")
    if any(shutil.which(name) is None for name in DAEMONS):
        if shutil.which("apt-get") is None:
            pytest.skip(f"needs {', '.join(DAEMONS)}, Debian's packages slurm-wlm and munge")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        packages = ["slurmctld", "slurmd", "slurm-client", "munge"]
        for step in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", *packages]):
            done = subprocess.run(["apt-get", *step], env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"apt-get {step[0]}: {done.stderr.strip()[-500:]}")
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    host = socket.gethostname().partition(".")[0]
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    CONFIGURATION.parent.mkdir(parents=True, exist_ok=True)
    CONFIGURATION.write_text(
        f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
MinJobAge=600
KillWait=5
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
    )
    munge = [
        *("munged", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.sock"),
        *(f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"),
    ]
    try:
        for command in (munge, ["slurmctld"], ["slurmd"]):
            subprocess.run(command, check=True, timeout=60)
        deadline = time.monotonic() + 60
        while "idle" not in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout:
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.5)
        yield
    finally:
        for name in reversed(DAEMONS):
            pid = folder / f"{name}.pid"
            if pid.exists():
                os.kill(int(pid.read_text()), signal.SIGTERM)
        CONFIGURATION.unlink()


def test_a_sweep_whose_jobs_own_their_workers(compiled_kernels: None, cluster: None, workspace) -> None:
    workspace.config |= {"gammas": [1], "mode": "overlap"}
    del workspace.config["workers"]["threads"]
    done = workspace.snakemake(*FLAGS)
    logs = "".join(f.read_text() for f in workspace.folder.glob(".snakemake/slurm_logs/**/*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + workspace.logs() + logs
    assert done.stderr.count("has been submitted with SLURM jobid") == 2  # gamma 0 and gamma 1; the rest is local
    results = workspace.folder / "results"
    summary = pd.read_csv(results / "summary.csv")
    summary = summary[summary["setup"] == "workers"]
    assert list(zip(summary["mode"], summary["gamma"], strict=True)) == [("sync", 0), ("overlap", 1)]
    assert (summary["lossless"] == 1).all()
    assert len(list((results / "logs" / "workers").glob("*.log"))) == 3  # a worker of its own for each run and role
    assert workspace.wait_until(lambda: not workspace.processes(), 10), workspace.processes()


def test_a_cancelled_job_leaves_no_worker(cluster: None, workspace) -> None:
    workspace.config |= {"gammas": [1]}
    workspace.config["generation"] = {"max_output_tokens": 100, "ignore_eos": True}
    workspace.write_prompts(*["one two three"] * 200)
    process = workspace.start(*FLAGS)
    try:
        serving = "results/runs/gamma_*/unfinished.jsonl"
        assert workspace.wait_until(lambda: any(workspace.folder.glob(serving)), 120), workspace.logs()
        subprocess.run(["scancel", "--user", "root"], check=True)
        assert workspace.wait_until(
            lambda: not any("specsplit" in line and "snakemake" not in line for line in workspace.processes()), 30
        ), workspace.processes()
    finally:
        process.kill()
        process.wait()
        subprocess.run(["scancel", "--user", "root"], check=True)


def test_workers_of_the_workflow_are_refused_on_a_cluster(cluster: None, workspace) -> None:
    done = workspace.snakemake(*FLAGS, "--config", "workers={lifecycle: workflow}")
    assert done.returncode != 0
    assert "set workers.lifecycle to job" in done.stdout + done.stderr
    assert "most recent call last" not in done.stdout + done.stderr
