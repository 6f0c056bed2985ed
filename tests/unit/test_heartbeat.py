"""What lives on another host is known by its heartbeat, whatever the clocks say."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil
import pytest

from specsplit.launch import heartbeat
from specsplit.launch.endpoint import Endpoint
from specsplit.launch.heartbeat import LEASE_FILE, LEASE_HOST, LEASE_PID, Pulse, hold_lease, silent, start_heartbeat
from specsplit.launch.lease import Lease, lease_holder
from specsplit.launch.process import ProcessIdentity
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.workflow.files import dead_worker

from waiting import wait_until


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.05)
    monkeypatch.setattr(heartbeat, "SILENT_S", 1.0)
    for name in (LEASE_PID, LEASE_HOST, LEASE_FILE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def move_to_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were the next container, with a name of its own."""
    monkeypatch.setattr(socket, "gethostname", lambda: "another")


# ---- a clock that is set


@pytest.mark.parametrize("shift_s", [-86400.0, 6.0, 3600.0])
def test_no_step_of_the_clock_ends_a_process(monkeypatch: pytest.MonkeyPatch, shift_s: float) -> None:
    me = ProcessIdentity.of(os.getpid())
    endpoint = Endpoint.local("127.0.0.1", 1, pb.DescribeReply(), me)
    assert me is not None
    assert me.birth
    create_time = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: create_time(process) + shift_s)
    assert me.alive()
    assert Lease(holder=me).lost() is None
    assert not endpoint.stale()
    # A later process that has our number and, by the clock, our start.
    assert not ProcessIdentity(me.pid, me.started, me.birth.replace("/", "/1")).alive()
    assert not ProcessIdentity(me.pid, me.started, f"another-boot/{me.birth.partition('/')[2]}").alive()


def test_a_program_with_spaces_and_parentheses_in_its_name_has_an_identity(tmp_path: Path) -> None:
    program = tmp_path / "a) b (c"
    program.symlink_to("/bin/sleep")
    process = psutil.Popen([str(program), "30"])
    try:
        identity = ProcessIdentity.of(process.pid)
        assert identity is not None
        assert identity.birth
        assert identity.alive()
    finally:
        process.kill()
        process.wait()
    assert not identity.alive()


# ---- two hosts


def test_a_file_is_silent_once_nobody_touches_it(tmp_path: Path) -> None:
    beating, dead = tmp_path / "beating", tmp_path / "dead"
    beating.touch()
    dead.touch()
    over = start_heartbeat(beating)
    assert silent({beating, dead, tmp_path / "gone"}) == {dead, tmp_path / "gone"}
    pulse = Pulse(beating)
    assert pulse.alive()
    over.set()
    assert wait_until(lambda: not pulse.alive())


def test_a_worker_on_another_host_is_stale_when_its_heart_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, beat = tmp_path / "gamma_1" / "target.json", tmp_path / "gamma_1" / ".target.json.heartbeat"
    beat.parent.mkdir()
    beat.touch()
    Endpoint.local("127.0.0.1", 1, pb.DescribeReply(), ProcessIdentity.of(os.getpid()), heartbeat=beat).write(file)
    over = start_heartbeat(beat)
    move_to_another_host(monkeypatch)
    worker = os.getpid()
    assert dead_worker(str(file), "no run") is None
    over.set()
    assert wait_until(lambda: silent({beat}) == {beat})
    assert dead_worker(str(file), "no run") == worker


def test_a_worker_ends_with_its_holder_on_another_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.json"
    file.touch()
    over = start_heartbeat(file)
    hold_lease(file)
    move_to_another_host(monkeypatch)
    lease = Lease(holder=lease_holder())
    assert lease.holder is not None
    assert lease.lost() is None
    over.set()
    assert wait_until(lambda: lease.lost() is not None)


# ---- files that are not ours


@pytest.mark.parametrize("content", ['{"address": "gpu-1:50051"}', '{"note": 1}', "[]", "3"])
def test_what_somebody_wrote_by_hand_is_no_dead_worker(tmp_path: Path, content: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(content)
    assert dead_worker(str(path), "no run") is None
    assert path.read_text() == content


def test_a_worker_ends_when_another_one_takes_its_endpoint_file(tmp_path: Path) -> None:
    file = tmp_path / "target.json"
    file.write_text("1")
    lease = Lease(file=file, written=True, inode=file.stat().st_ino)
    assert lease.lost() is None
    other = tmp_path / "other"
    other.write_text("2")
    other.replace(file)
    assert lease.lost() == f"endpoint file {file} is another worker's now"
