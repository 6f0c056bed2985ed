"""Starting a worker in the background, waiting until it serves, stopping it; attaching to one that runs."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from specsplit.errors import UserError
from specsplit.io import json_sha256, scratch_folder
from specsplit.launch.endpoint import Endpoint, resolve_address
from specsplit.launch.environment import COMMAND, deterministic_environment
from specsplit.launch.heartbeat import hold_lease
from specsplit.launch.lease import STARTER_PID, user_lock
from specsplit.launch.process import end_process
from specsplit.models.sources import resolve_model
from specsplit.rpc.connection import OPEN, connect
from specsplit.rpc.credentials import Access
from specsplit.settings.worker import WorkerSettings

log = logging.getLogger(__name__)

POLL_S = 0.1
LOOK_S = 0.5  # between looks at workers that are started again
AGAIN_S = 5.0  # after a start that failed
LOG_TAIL_LINES = 15


def start_worker(
    role: str,
    worker_args: Sequence[str],
    *,
    endpoint_file: Path,
    timeout_s: float,
    log_file: Path | None = None,
    cuda_devices: str | None = None,
) -> Endpoint:
    """Start `specsplit worker ROLE` detached from this process and wait until it serves.

    worker_args: its flags. endpoint_file: written by the worker when it serves; deleting it stops the worker.
    log_file: gets everything that the worker prints, and messages name it; None = a file beside the endpoint file, in a
    folder that goes with this process. cuda_devices: its CUDA_VISIBLE_DEVICES; None = ours.
    Raises UserError, with the end of the log, when the worker ends or does not serve within `timeout_s` seconds; no
    process is left then.
    """
    endpoint_file.unlink(missing_ok=True)
    full_log = f"\n  (full log: {log_file})" if log_file else ""
    log_file = log_file or endpoint_file.with_suffix(".log")
    log_file.parent.mkdir(parents=True, exist_ok=True)
    command = [*COMMAND, "worker", role, *worker_args, "--endpoint-file", str(endpoint_file)]
    environment = {**deterministic_environment(), STARTER_PID: str(os.getpid())}
    if cuda_devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = cuda_devices
    deadline = time.monotonic() + timeout_s
    process = None
    # Blocked while the process is made: a signal during Popen would leave it running.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        with log_file.open("ab") as output:
            log_start = output.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a Ctrl-C at the terminal must not reach it before its lease ends
                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, mask),
            )
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while not endpoint_file.exists():
            problem = f"ended with status {process.returncode}" if process.poll() is not None else ""
            if not problem and time.monotonic() > deadline:
                problem = f"did not serve within {timeout_s:g} s (workers.startup_timeout_s)"
            if problem:
                raise UserError(f"the {role} worker {problem}:\n{_tail(log_file, log_start)}{full_log}")
            time.sleep(POLL_S)
    except BaseException:
        if process is not None:
            end_process(process)
        endpoint_file.unlink(missing_ok=True)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return replace(Endpoint.read(endpoint_file), log=str(log_file))


def share_worker(
    role: str,
    worker_args: Sequence[str],
    *,
    pool: Path,
    endpoint_file: Path,
    log_file: Path,
    timeout_s: float,
    cuda_devices: str | None = None,
) -> Endpoint:
    """Like `start_worker`, but use a worker of this pool that was started with the same flags and still runs.

    pool: a folder. The worker ends when the endpoint files of all who share it are gone, so each user's file is a
    lease of its own.
    """
    key = json_sha256([role, *worker_args, cuda_devices])[:12]
    own_file, users = pool / f"{role}-{key}.json", pool / f"{role}-{key}.users"
    pool.mkdir(parents=True, exist_ok=True)
    with user_lock(users):
        endpoint = Endpoint.read(own_file) if own_file.exists() else None
        if endpoint is None or endpoint.stale():
            users.unlink(missing_ok=True)
            arguments = [*worker_args, "--users-file", str(users)]
            how: dict[str, Any] = {"log_file": log_file, "timeout_s": timeout_s, "cuda_devices": cuda_devices}
            endpoint = start_worker(role, arguments, endpoint_file=own_file, **how)
        with users.open("a", encoding="utf-8") as file:
            file.write(f"{endpoint_file.absolute()}\n")
        endpoint = replace(endpoint, shared=True, log=str(log_file))
        endpoint.write(endpoint_file)
    return endpoint


def attach_worker(
    role: str,
    address: str,
    wanted: WorkerSettings,
    *,
    endpoint_file: Path,
    timeout_s: float = 10.0,
    access: Access = OPEN,
) -> Endpoint:
    """Write the endpoint file of a worker that already runs, after checking that it is the one meant.

    address: host:port, grpcs://host:port, or an address file. wanted: its settings as if it were started; compared are
    weights, dtype (auto asks for none) and skipped layers. access: how we show who we are. Such a worker is never
    stopped. Raises UserError when nothing answers there, or when it is another one.
    """
    address = resolve_address(address)
    with connect(role, address, timeout_s=timeout_s, access=access) as connection:
        description = connection.description
    assert wanted.model is not None
    _, manifest = resolve_model(wanted.model)
    compared = {
        "weights": (description.weights_sha256, manifest["fingerprint"]["weights_sha256"]),
        "dtype": (description.dtype, description.dtype if wanted.dtype == "auto" else wanted.dtype),
        "skip_layers": (list(description.skip_layers), getattr(wanted, "skip_layers", [])),
    }
    differing = [f"{key} {found} instead of {asked}" for key, (found, asked) in compared.items() if found != asked]
    if differing:
        raise UserError(
            f"the {role} worker at {address} serves another model than the configuration names: "
            f"{'; '.join(differing)}. Start it with that model, or mend the configuration."
        )
    endpoint = Endpoint.of_running(address, description)
    endpoint.write(endpoint_file)
    return endpoint


@contextmanager
def own_workers(
    starts: Mapping[str, Callable[[Path], Endpoint]], *, again: bool = False
) -> Iterator[dict[str, Endpoint]]:
    """Workers of this process alone, by role: stopped at the end of the block, and when this process dies.

    starts: role -> what starts its worker, given the endpoint file to write. again: one that dies meanwhile is started
    again, so `starts` has to give it the same address. This process still ends with the process that it was started
    for.
    """
    hold_lease()
    with scratch_folder("specsplit-") as folder, ExitStack() as stack:
        started, over = {}, threading.Event()
        for role, start in starts.items():
            file = folder / f"{role}.json"
            stack.callback(stop_worker, file)
            started[role] = start(file)
        stack.callback(over.set)
        for role, endpoint in started.items() if again else ():
            arguments = role, endpoint, partial(starts[role], folder / f"{role}.json"), over
            threading.Thread(target=_start_again, args=arguments, daemon=True).start()
        yield started


def _start_again(role: str, endpoint: Endpoint, start: Callable[[], Endpoint], over: threading.Event) -> None:
    """Start a worker again each time that it dies; in a thread of its own, so that one that hangs holds up no other."""
    while not over.wait(LOOK_S):
        process = endpoint.process()
        if process is not None and not process.alive():
            log.warning("the %s worker has died; it is started again", role)
            try:
                endpoint = start()
            except (UserError, OSError) as error:
                log.error("%s; tried again in %g s", error, AGAIN_S)
                over.wait(AGAIN_S)


def stop_worker(endpoint_file: Path, *, timeout_s: float = 10.0) -> Endpoint | None:
    """End the lease of a worker by deleting its endpoint file, and wait until its process is gone.

    Returns None when there was no such file. It does not wait for a worker of a pool, which others may use, nor for an
    attached one, which keeps running.
    """
    if not endpoint_file.exists():
        return None
    endpoint = Endpoint.read(endpoint_file)
    endpoint_file.unlink(missing_ok=True)
    process = None if endpoint.shared else endpoint.process()
    deadline = time.monotonic() + timeout_s
    while process is not None and process.alive():
        if time.monotonic() > deadline:
            raise UserError(f"worker process {process.pid} still runs {timeout_s:g} s after its endpoint file went")
        time.sleep(POLL_S)
    return endpoint


def _tail(log_file: Path, start: int) -> str:
    lines = log_file.read_bytes()[start:].decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join(f"  {line}" for line in lines)
