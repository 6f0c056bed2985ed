"""Workers as processes of their own: how they start, what they tell, and that every one of them ends."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from specsplit.cli.main import main
from specsplit.errors import UserError, WorkerError
from specsplit.launch.endpoint import Endpoint
from specsplit.launch.heartbeat import LEASE_HOST, LEASE_PID
from specsplit.launch.start import attach_worker, start_worker, stop_worker
from specsplit.rpc.connection import connect
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.worker import DraftWorkerConfig, TargetWorkerConfig
from specsplit.worker.server import WorkerServer, load_servicer

from grpc_fixtures import draft_request, serving
from waiting import wait_until

SPECSPLIT = (sys.executable, "-m", "specsplit")
TINY = ["--port", "0", "--threads", "1", "--dtype", "float32", "--max-context", "128"]


@pytest.fixture(scope="module")
def model(tiny_model_folder: Callable[..., Path]) -> Path:
    return tiny_model_folder("llama")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SPECSPLIT_")]:
        monkeypatch.delenv(name)
    for name in ("PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for endpoint files and logs. Every process that was given a path in it is ended with the test."""
    yield tmp_path
    for process in users_of(tmp_path):
        process.kill()
        process.wait(20)


def users_of(folder: Path) -> list[psutil.Process]:
    """Running processes whose command line names something in `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE
            if not mine and any(str(folder) in argument for argument in process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The specsplit command, as a user types it."""
    command = [*SPECSPLIT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def start(folder: Path, model: Path, name: str = "target", *flags: str) -> Endpoint:
    arguments = ["--model", str(model), *TINY, *flags]
    return start_worker(
        "target", arguments, endpoint_file=folder / f"{name}.json", log_file=folder / f"{name}.log", timeout_s=60
    )


def running(endpoint: Endpoint) -> bool:
    process = endpoint.process()
    return process is not None and process.alive()


def ends(endpoint: Endpoint, seconds: float = 20) -> bool:
    return wait_until(lambda: not running(endpoint), seconds)


# ---- a worker started by hand


def test_a_worker_from_its_start_to_sigterm(model: Path, folder: Path) -> None:
    """Signalled while calls run: they are answered, the process exits with status 0."""
    file = folder / "draft.json"
    command = [*SPECSPLIT, "worker", "draft", "--model", str(model), *TINY, "--endpoint-file", str(file)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, "--drain-s", "30"], stdout=log, stderr=log)
    try:
        assert wait_until(file.exists, 60), (folder / "log").read_text()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        endpoint = Endpoint.read(file)
        assert (endpoint.pid, endpoint.attached, endpoint.holder_pid) == (process.pid, False, None)
        with connect("draft", endpoint.address) as worker, ThreadPoolExecutor(8) as pool:
            # Python reads PYTHONHASHSEED at its start only: the process has been started with it.
            environment = dict(worker.description.environment)
            assert environment["PYTHONHASHSEED"] == "0"
            assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            assert psutil.Process(process.pid).environ()["PYTHONHASHSEED"] == "0"
            assert endpoint.worker["environment"] == environment
            assert worker.description.pid == process.pid

            # Sessions share their passes: drafts of one length would all be done at once. The short one comes last.
            # Level by level, a pass each: a chain in one call may be done before the others have come.
            gammas = [*[64] * 7, 1]
            requests = [
                draft_request([5, 6], gamma=gamma, branching=[1], session=f"s{i}") for i, gamma in enumerate(gammas)
            ]
            calls = [pool.submit(worker.stub.GenerateDrafts, request, timeout=60) for request in requests]
            unanswered = wait(calls, 30, FIRST_COMPLETED).not_done
            process.send_signal(signal.SIGTERM)
            outcomes = [call.exception(60) or call.result() for call in unanswered]
        answers = [outcome for outcome in outcomes if isinstance(outcome, pb.GenerateDraftsReply)]
        assert answers
        assert all(answer.tree == answers[0].tree for answer in answers)
        assert len(answers[0].tree.token_ids) == 64
        assert answers[0].tree.token_ids[:1] == calls[-1].result().tree.token_ids
        refusals = [outcome for outcome in outcomes if isinstance(outcome, grpc.RpcError)]
        assert {refusal.code() for refusal in refusals} <= {grpc.StatusCode.UNAVAILABLE}  # those that came too late
        assert process.wait(30) == 0
        assert not file.exists()
        assert (folder / "log").read_text().rstrip().endswith("stopped")
    finally:
        process.kill()
        process.wait()


def test_a_port_in_use_is_told() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^cannot listen on 127\.0\.0\.1:{port}: it is in use"):
            WorkerServer(TargetWorkerConfig(port=port)).start()


def test_a_missing_model_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"^models/none: no such folder; prepare the model first"):
        load_servicer(DraftWorkerConfig(model=Path("models/none")))
    with pytest.raises(UserError, match="no model: give --model FOLDER or set SPECSPLIT_DRAFT_MODEL"):
        load_servicer(DraftWorkerConfig())


# ---- workers in the background


def test_start_worker_and_stop_worker(model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, log = folder / "draft.json", folder / "logs" / "draft.log"
    flags = ["--endpoint-file", file, "--worker-log", log, "--threads", "1", "--skip-layers", "1"]
    started = run("start-worker", "draft", "--model", model, *flags)
    assert started.returncode == 0, started.stderr
    endpoint = Endpoint.read(file)
    assert started.stdout == f"draft worker, process {endpoint.pid}, serves at {endpoint.address}\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "serving draft" in log.read_text()
    with connect("draft", endpoint.address) as worker:
        assert list(worker.description.skip_layers) == [1]
    assert psutil.Process(endpoint.pid).environ()["PYTHONHASHSEED"] == "0"

    stopped = run("stop-worker", file)
    assert (stopped.returncode, stopped.stdout) == (0, f"stopped process {endpoint.pid}\n")
    assert not running(endpoint)
    assert not file.exists()
    assert f"stopping: endpoint file {file} is gone" in log.read_text()
    main(["stop-worker", str(file)])
    assert capsys.readouterr().out == f"{file} is not there: nothing to stop\n"


def test_a_worker_ends_with_the_process_it_was_started_for(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        monkeypatch.setenv(LEASE_PID, str(holder.pid))
        monkeypatch.setenv(LEASE_HOST, socket.gethostname())
        endpoint = start(folder, model)
        assert (endpoint.holder_pid, endpoint.stale()) == (holder.pid, False)
        holder.kill()  # SIGKILL: it can tell nobody, and nobody waits for it yet
        assert ends(endpoint)
        assert not (folder / "target.json").exists()
    finally:
        holder.kill()
        holder.communicate()


def test_a_worker_that_has_stopped_waits_for_no_thread(model: Path, folder: Path) -> None:
    """Python's own end would: a stopped worker was there for seconds."""
    file = folder / "target.json"
    code = f"""import threading, time
from pathlib import Path
from specsplit.settings.worker import TargetWorkerConfig
from specsplit.worker.server import serve
threading.Thread(target=time.sleep, args=(100,)).start()
serve(TargetWorkerConfig(model={str(model)!r}, port=0, threads=1, max_context=128), endpoint_file=Path({str(file)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert wait_until(file.exists, 60)
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "command",
    [
        "worker draft --model none --skip-layers-file /dev/stdin",
        "prepare-dataset --source /dev/stdin --output prompts.jsonl --manifest manifest.json",
    ],
)
def test_a_process_that_does_not_get_on_ends_with_the_one_it_was_started_for(folder: Path, command: str) -> None:
    """A worker ends before its model is loaded, too: nobody waits for it."""
    holder = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    environment = {**os.environ, LEASE_PID: str(holder.pid), LEASE_HOST: socket.gethostname()}
    # Nothing ever comes out of the pipe.
    process = subprocess.Popen([*SPECSPLIT, *command.split()], cwd=folder, env=environment, stdin=subprocess.PIPE)
    try:
        assert process.poll() is None
        holder.kill()
        assert process.wait(20) == 143
    finally:
        for started in (holder, process):
            started.kill()
            started.communicate()


def test_a_worker_that_cannot_start_leaves_nothing(model: Path, folder: Path) -> None:
    broken = folder / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    log, file = folder / "worker.log", folder / "target.json"
    log.write_text("of an earlier worker\n")
    with pytest.raises(UserError, match="the target worker ended with status 2:") as refused:
        start_worker("target", ["--model", str(broken)], endpoint_file=file, log_file=log, timeout_s=60)
    assert "model.safetensors: not a readable safetensors file" in str(refused.value)  # the end of the log
    assert f"(full log: {log})" in str(refused.value)
    assert "earlier worker" not in str(refused.value)
    assert "Traceback" not in log.read_text()
    assert not file.exists()
    assert users_of(folder) == []


def test_a_worker_that_takes_too_long_leaves_nothing(model: Path, folder: Path) -> None:
    flags = ["--model", str(model), *TINY]
    file, log = folder / "target.json", folder / "target.log"
    with pytest.raises(UserError, match=r"did not serve within 0\.1 s \(workers\.startup_timeout_s\)"):
        start_worker("target", flags, endpoint_file=file, log_file=log, timeout_s=0.1)
    assert users_of(folder) == []
    assert not file.exists()


def test_sigterm_to_start_worker_while_the_worker_loads_leaves_nothing(model: Path, folder: Path) -> None:
    flags = ["--endpoint-file", str(folder / "target.json"), "--worker-log", str(folder / "target.log")]
    process = subprocess.Popen([*SPECSPLIT, "start-worker", "target", "--model", str(model), *flags])
    try:
        assert wait_until((folder / "target.log").exists)
        assert wait_until(lambda: len(users_of(folder)) == 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
        assert users_of(folder) == []
        assert not (folder / "target.json").exists()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_while_the_model_loads_ends_the_process_at_once(folder: Path, number: signal.Signals) -> None:
    # One uninterrupted call, as of a library that reads weights; a handler in Python would wait for its end.
    code = (
        "import sys, ctypes; from pathlib import Path; from specsplit.worker import server\n"
        "from specsplit.settings.worker import TargetWorkerConfig\n"
        "def load(config):\n"
        "    print('loading', flush=True)\n"
        "    while True:\n"
        "        ctypes.CDLL(None).sleep(60)\n"
        "server.load_servicer = load\n"
        "server.serve(TargetWorkerConfig(port=0), endpoint_file=Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", code, str(folder / "target.json")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"loading\n"
        process.send_signal(number)
        assert process.wait(10) == -number
        assert list(folder.iterdir()) == []
    finally:
        process.kill()
        process.communicate()


STEPS: dict[str, Callable[[Path], bool]] = {
    "before there is a worker": lambda folder: len(users_of(folder)) >= 1,
    "once there is a worker": lambda folder: len(users_of(folder)) >= 2,
    "while it loads": lambda folder: any(process.num_threads() > 2 for process in users_of(folder)),
    "once it serves": lambda folder: (folder / "target.json").exists(),
}


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_start_worker_killed_at_any_step_leaves_nothing_beyond_the_next_start(
    step: str, model: Path, folder: Path
) -> None:
    flags = ["--endpoint-file", str(folder / "target.json"), "--worker-log", str(folder / "target.log")]
    process = subprocess.Popen([*SPECSPLIT, "start-worker", "target", "--model", str(model), *TINY, *flags])
    try:
        assert wait_until(lambda: STEPS[step](folder), 60)
        process.kill()
        process.wait()
        served = (folder / "target.json").exists()  # then it is in use, and ends with this file
        assert served or wait_until(lambda: users_of(folder) == [] or (folder / "target.json").exists(), 30)
        endpoint = start(folder, model)
        assert wait_until(lambda: [p.pid for p in users_of(folder)] == [endpoint.pid], 30)
        stop_worker(folder / "target.json")
        assert users_of(folder) == []
        assert [path.name for path in folder.iterdir()] == ["target.log"]
    finally:
        process.kill()
        process.wait()


# ---- workers that are shared


@pytest.mark.slow
def test_users_of_a_pool_share_a_worker_until_the_last_one_goes(model: Path, folder: Path) -> None:
    def share(user: str, *flags: str) -> Endpoint:
        file = folder / f"{user}.json"
        where = ["--endpoint-file", file, "--pool", folder / "pool", "--worker-log", folder / "pool.log"]
        done = run("start-worker", "target", "--model", model, *TINY, *where, *flags)
        assert done.returncode == 0, done.stderr
        return Endpoint.read(file)

    with ThreadPoolExecutor(3) as threads:  # all at once
        calls = [threads.submit(share, *arguments) for arguments in (["one"], ["two"], ["other", "--seed", "7"])]
        one, two, other = (call.result() for call in calls)
    assert one == two
    assert one.shared
    assert other.pid != one.pid
    assert stat.S_IMODE((folder / "two.json").stat().st_mode) == 0o600

    stopped = run("stop-worker", folder / "one.json")
    assert stopped.returncode == 0
    assert f"the worker at {one.address} stops when nobody uses it any more" in stopped.stdout
    with connect("target", two.address) as worker:
        assert worker.description.pid == two.pid
    (folder / "two.json").unlink()
    assert ends(two)
    assert running(other)
    assert [path.name for path in (folder / "pool").glob("*.json")] == [f"target-{key_of(folder, other)}.json"]

    os.kill(other.pid or 0, signal.SIGKILL)  # it leaves its files behind, and they name no worker
    assert ends(other)
    (folder / "other.json").unlink()
    assert share("again", "--seed", "7").pid != other.pid


def key_of(folder: Path, endpoint: Endpoint) -> str:
    """The key under which the pool keeps a worker."""
    for path in (folder / "pool").glob("*.json"):
        if Endpoint.read(path).pid == endpoint.pid:
            return path.stem.partition("-")[2]
    raise AssertionError("not in the pool")


# ---- workers that run already


def test_attaching_to_a_running_worker(model: Path, folder: Path) -> None:
    with serving("target", model) as worker:
        where = ["--endpoint-file", folder / "target.json", "--worker-log", folder / "log"]
        done = run("start-worker", "target", "--model", model, *TINY, *where, "--attach", worker.address)
        assert (done.returncode, done.stdout) == (0, f"attached to the target worker at {worker.address}\n")
        endpoint = Endpoint.read(folder / "target.json")
        assert (endpoint.address, endpoint.attached, endpoint.pid) == (worker.address, True, None)
        assert endpoint.worker["model"] == model.name
        assert stop_worker(folder / "target.json") == endpoint
        assert worker.stub.Describe(pb.DescribeRequest()).pid == os.getpid()


def test_a_worker_with_another_model_is_not_attached_to(
    model: Path, folder: Path, tiny_model_folder: Callable[..., Path]
) -> None:
    another = tiny_model_folder("llama", 1)
    with serving("draft", model, dtype="bfloat16", skip_layers=[0]) as worker:
        file = folder / "draft.json"
        asked: dict[str, Any] = {"model": model, "dtype": "bfloat16"}
        for wanted, reason in (
            ({"skip_layers": [0], "dtype": "float32"}, "dtype bfloat16 instead of float32"),
            ({"skip_layers": []}, r"skip_layers \[0\] instead of \[\]"),
            ({"skip_layers": [0], "model": another}, "weights [0-9a-f]{64} instead of"),
        ):
            with pytest.raises(UserError, match=reason):
                attach_worker("draft", worker.address, DraftWorkerConfig(**asked | wanted), endpoint_file=file)
            assert not file.exists()
        for dtype in ("auto", "bfloat16"):
            config = DraftWorkerConfig(**asked | {"dtype": dtype, "skip_layers": [0]})
            attach_worker("draft", worker.address, config, endpoint_file=file)
        assert Endpoint.read(file).address == worker.address


def test_where_nobody_answers_there_is_nothing_to_attach_to(model: Path, folder: Path) -> None:
    config = DraftWorkerConfig(model=model)
    with pytest.raises(WorkerError, match=r"no target worker answers at 127\.0\.0\.1:1 within 0\.2 s"):
        attach_worker("target", "127.0.0.1:1", config, endpoint_file=folder / "x.json", timeout_s=0.2)
    assert list(folder.iterdir()) == []
