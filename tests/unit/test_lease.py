"""Leases: a worker lives no longer than what it was started for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from specsplit.launch.heartbeat import LEASE_HOST, LEASE_PID, hold_lease
from specsplit.launch.lease import Lease, ProcessIdentity, lease_holder, user_lock

ME = ProcessIdentity(os.getpid(), psutil.Process().create_time())


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def _no_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (LEASE_PID, LEASE_HOST):
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)


# ---- processes


def test_a_process_is_alive_until_it_ends(child: subprocess.Popen[bytes]) -> None:
    identity = ProcessIdentity.of(child.pid)
    assert identity is not None
    assert identity.alive()
    child.kill()
    psutil.wait_procs([psutil.Process(child.pid)], timeout=10)
    assert not identity.alive()
    assert ProcessIdentity.of(child.pid) is None


def test_a_process_that_nobody_has_waited_for_is_not_alive(child: subprocess.Popen[bytes]) -> None:
    identity = ProcessIdentity.of(child.pid)
    assert identity is not None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
    assert not identity.alive()


def test_a_later_process_with_the_same_number_is_another_one() -> None:
    assert not ProcessIdentity(ME.pid, ME.started - 60).alive()


def test_a_correction_of_the_clock_ends_nobody() -> None:
    assert ProcessIdentity(ME.pid, ME.started + 1).alive()


# ---- the holder


def test_without_the_variable_there_is_no_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lease_holder() is None
    monkeypatch.setenv(LEASE_PID, "not a number")
    assert lease_holder() is None


def test_the_holder_is_the_process_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEASE_PID, str(ME.pid))
    assert lease_holder() == ME


def test_a_holder_that_is_gone_already_is_not_alive(
    monkeypatch: pytest.MonkeyPatch, child: subprocess.Popen[bytes]
) -> None:
    child.kill()
    child.wait()
    monkeypatch.setenv(LEASE_PID, str(child.pid))
    holder = lease_holder()
    assert holder is not None
    assert not holder.alive()


def test_a_number_of_another_host_means_nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEASE_PID, str(ME.pid))
    monkeypatch.setenv(LEASE_HOST, "elsewhere")
    assert lease_holder() is None


def test_a_process_holds_the_lease_of_what_it_starts() -> None:
    hold_lease()
    assert lease_holder() == ME


def test_a_client_ends_with_its_holder(child: subprocess.Popen[bytes]) -> None:
    code = "from specsplit.launch.lease import *; end_with_lease(0.05); print('on', flush=True); time.sleep(60)"
    environment = {**os.environ, LEASE_PID: str(child.pid)}
    client = subprocess.Popen([sys.executable, "-c", f"import time; {code}"], env=environment, stdout=subprocess.PIPE)
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == b"on\n"
        assert client.poll() is None
        child.kill()
        assert client.wait(20) == 143
    finally:
        client.kill()
        client.communicate()


# ---- what ends a lease


def test_a_lease_on_nothing_is_never_lost() -> None:
    assert Lease().lost() is None


def test_a_lease_ends_with_its_holder() -> None:
    assert Lease(holder=ME).lost() is None
    reason = Lease(holder=ProcessIdentity(ME.pid, 1.0)).lost()
    assert reason == f"process {ME.pid}, which this worker was started for, is gone"


def test_a_lease_ends_with_its_file_once_that_was_written(tmp_path: Path) -> None:
    file = tmp_path / "target.json"
    lease = Lease(file=file)
    assert lease.lost() is None  # still loading
    file.touch()
    lease.written = True
    assert lease.lost() is None
    file.unlink()
    assert lease.lost() == f"endpoint file {file} is gone"


def test_a_shared_lease_ends_with_the_last_user(tmp_path: Path) -> None:
    file, users = tmp_path / "target.json", tmp_path / "target.users"
    mine, yours = tmp_path / "mine.json", tmp_path / "yours.json"
    for path in (file, mine, yours):
        path.touch()
    users.write_text(f"{mine}\n{yours}\n")
    lease = Lease(file=file, users=users, written=True)
    assert lease.lost() is None
    mine.unlink()
    assert lease.lost() is None
    yours.unlink()
    assert lease.lost() == "nobody uses this worker any more"
    assert not file.exists()  # nobody can find it and share it while it stops
    assert not users.exists()


def test_a_worker_stays_while_somebody_is_about_to_share_it(tmp_path: Path) -> None:
    file, users = tmp_path / "target.json", tmp_path / "target.users"
    file.touch()
    lease = Lease(file=file, users=users, written=True)
    with user_lock(users):
        assert lease.lost() is None
        assert file.exists()
    assert lease.lost() == "nobody uses this worker any more"
