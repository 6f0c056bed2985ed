"""A run that was killed does not block the next; one that is alive is left alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from specsplit.launch.endpoint import Endpoint
from specsplit.launch.lease import LEASE_FILE, LEASE_HOST, LEASE_PID, ProcessIdentity
from specsplit.launch.workflow_runs import begin_run
from specsplit.rpc.v1 import specsplit_pb2 as pb

HOST = socket.gethostname()


class Folder:
    """The state that Snakemake and its runs leave in a project folder."""

    def __init__(self, root: Path) -> None:
        self.state, self.workers = root / ".snakemake", root / "workers"
        self.runs = self.state / "specsplit-runs"
        self.lock = self.state / "locks" / "0.input.lock"
        self.lock.parent.mkdir(parents=True)
        self.lock.touch()

    def add_run(self, pid: int, started: float, host: str = HOST) -> Path:
        self.runs.mkdir(exist_ok=True)
        path = self.runs / f"{host}-{pid}.json"
        path.write_text(json.dumps({"host": host, "pid": pid, "started": started}))
        return path

    def begin(self) -> Path:
        begin_run(self.state, self.workers)
        return self.runs / f"{HOST}-{os.getpid()}.json"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    for name in (LEASE_PID, LEASE_HOST, LEASE_FILE):
        monkeypatch.setenv(name, "")  # so that what begin_run sets is undone
        monkeypatch.delenv(name)
    return Folder(tmp_path)


def test_a_run_registers_and_holds_the_lease(folder: Folder) -> None:
    content = json.loads(folder.begin().read_text())
    assert ProcessIdentity(content["pid"], content["started"], content["birth"]).alive()
    assert (content["host"], content["pid"]) == (HOST, os.getpid())
    assert os.environ[LEASE_PID] == str(os.getpid())


def test_a_job_of_a_run_does_nothing(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEASE_PID, "1")
    dead = folder.add_run(os.getpid(), started=1.0)
    folder.begin()
    assert dead.exists()
    assert folder.lock.exists()
    assert os.environ[LEASE_PID] == "1"


def test_a_lock_that_no_registered_run_has_left_stays(folder: Folder) -> None:
    folder.begin()
    assert folder.lock.exists()


def test_the_lock_of_a_killed_run_is_cleared(folder: Folder) -> None:
    dead = folder.add_run(os.getppid(), started=1.0)
    folder.begin()
    assert not dead.exists()
    assert not folder.lock.exists()


def test_the_lock_of_a_killed_run_with_our_own_number_is_cleared(folder: Folder) -> None:
    folder.add_run(os.getpid(), started=1.0)
    mine = folder.begin()
    assert json.loads(mine.read_text())["started"] != 1.0
    assert not folder.lock.exists()


def test_a_file_that_cannot_be_read_is_that_of_a_killed_run(folder: Folder) -> None:
    dead = folder.add_run(os.getppid(), started=1.0)
    dead.write_text('{"host": ')
    folder.begin()
    assert not dead.exists()
    assert not folder.lock.exists()


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_while_another_run_may_be_alive_the_lock_stays(folder: Folder, where: str) -> None:
    parent = ProcessIdentity.of(os.getppid())
    assert parent is not None
    # On another host its number may well be taken by somebody else here.
    alive = folder.add_run(parent.pid, parent.started) if where == "here" else folder.add_run(1, 1.0, host=where)
    dead = folder.add_run(os.getpid() + 1, started=1.0)
    folder.begin()
    assert alive.exists()
    assert not dead.exists()
    assert folder.lock.exists()


def test_endpoint_files_of_dead_workers_are_removed(folder: Folder) -> None:
    mine = Endpoint.local("127.0.0.1", 1, pb.DescribeReply(), None)
    mine.write(folder.workers / "gamma_0" / "target.json")
    orphan = Endpoint.local("127.0.0.1", 1, pb.DescribeReply(), ProcessIdentity(os.getpid(), 1.0))
    orphan.write(folder.workers / "gamma_1" / "target.json")
    folder.begin()
    left = [path.parent.name for path in folder.workers.rglob("*.json")]
    assert left == ["gamma_0"]


@pytest.mark.parametrize("end", ["sys.exit()", "os._exit(1)"])
def test_only_a_run_that_was_killed_leaves_its_file(folder: Folder, end: str) -> None:
    code = f"import os, sys; from specsplit.launch.workflow_runs import begin_run; begin_run(); os.chdir('/'); {end}"
    subprocess.run([sys.executable, "-c", code], cwd=folder.state.parent, check=False)
    assert len(list(folder.runs.glob("*.json"))) == (1 if "_exit" in end else 0)
