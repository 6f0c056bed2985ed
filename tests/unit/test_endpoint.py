"""The endpoint file: what it says, who may read it, and when it is out of date."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from specsplit.errors import UserError
from specsplit.launch.endpoint import Endpoint, describe_identity, description_dict
from specsplit.launch.process import ProcessIdentity
from specsplit.rpc.v1 import specsplit_pb2 as pb

ME = ProcessIdentity(os.getpid(), psutil.Process().create_time())
GONE = ProcessIdentity(os.getpid(), 1.0)  # our number, another start: a process that is no more
START_OF_GONE = {"started": GONE.started, "birth": "another boot/1"}
DESCRIPTION = pb.DescribeReply(
    role="draft",
    model="tiny",
    dtype="bfloat16",
    device="cpu",
    threads=2,
    parameters=5_000_000_000,
    skip_layers=[3, 4],
    environment={"PYTHONHASHSEED": "0"},
)


@pytest.fixture
def endpoint() -> Endpoint:
    """That of this very process."""
    return Endpoint.local("127.0.0.1", 4242, DESCRIPTION, None)


def test_what_is_written_is_read_again(tmp_path: Path, endpoint: Endpoint) -> None:
    path = tmp_path / "deep" / "draft.json"
    endpoint.write(path)
    assert Endpoint.read(path) == endpoint
    assert endpoint.address == "127.0.0.1:4242"
    assert (endpoint.pid, endpoint.attached, endpoint.shared) == (os.getpid(), False, False)
    assert list(path.parent.iterdir()) == [path]


def test_only_the_owner_can_read_it(tmp_path: Path, endpoint: Endpoint) -> None:
    path = tmp_path / "draft.json"
    path.write_text("older, and readable by all")
    path.chmod(0o644)
    old_umask = os.umask(0)
    try:
        endpoint.write(path)
    finally:
        os.umask(old_umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"address": "x"}', "not json"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "draft.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"draft\.json"):
        Endpoint.read(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        Endpoint.read(tmp_path / "none.json")


def test_a_worker_removes_its_own_file_only(tmp_path: Path, endpoint: Endpoint) -> None:
    path = tmp_path / "draft.json"
    endpoint.write(path)
    Endpoint.remove(path, pid=os.getpid() + 1)
    assert path.exists()
    Endpoint.remove(path, pid=os.getpid())
    assert not path.exists()
    Endpoint.remove(path, pid=os.getpid())  # gone already


# ---- staleness


def test_a_running_worker_is_not_stale(endpoint: Endpoint) -> None:
    assert endpoint.process() == ME
    assert not endpoint.stale()


def test_a_worker_whose_process_is_gone_is_stale(endpoint: Endpoint) -> None:
    assert replace(endpoint, **START_OF_GONE).stale()


def test_a_worker_whose_holder_is_gone_is_stale() -> None:
    assert not Endpoint.local("127.0.0.1", 1, DESCRIPTION, ME).stale()
    assert Endpoint.local("127.0.0.1", 1, DESCRIPTION, GONE).stale()


def test_nobody_can_tell_about_a_worker_on_another_host(endpoint: Endpoint) -> None:
    elsewhere = replace(endpoint, host="elsewhere", **START_OF_GONE)
    assert elsewhere.process() is None
    assert not elsewhere.stale()


def test_an_attached_worker_is_never_stale() -> None:
    attached = Endpoint.of_running("gpu:50052", DESCRIPTION)
    assert (attached.attached, attached.host, attached.pid) == (True, "gpu", None)
    assert attached.process() is None
    assert not attached.stale()


# ---- descriptions


def test_a_description_has_every_field_in_plain_types() -> None:
    data = description_dict(DESCRIPTION)
    asked_for_by_itself, not_of_this = {"usage"}, {"states_needed", "states_given"}  # of heads, and their targets
    assert set(data) == {field.name for field in pb.DescribeReply.DESCRIPTOR.fields} - asked_for_by_itself - not_of_this
    assert data["parameters"] == 5_000_000_000
    assert data["weights_sha256"] == ""
    assert data["skip_layers"] == [3, 4]
    assert json.loads(json.dumps(data)) == data


def test_one_line_names_a_worker() -> None:
    line = describe_identity(DESCRIPTION)
    assert line == "draft tiny without layers [3, 4] (bfloat16, 5000.0M parameters, cpu, 2 threads)"
    assert "layers" not in describe_identity(pb.DescribeReply(role="target", model="big"))
