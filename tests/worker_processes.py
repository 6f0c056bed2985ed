"""Workers and command lines as processes that are there in a fraction of a second, to be killed at any moment.

They are forked from a process that has everything imported; each ends with the process that runs the tests.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from specsplit.launch.endpoint import Endpoint

_forks = multiprocessing.get_context("forkserver")
# What loading a model imports, too: by use_deterministic_algorithms, for one.
_IMPORTED = ("torch._inductor", "specsplit.engines.synthetic", "specsplit.worker.server", "specsplit.experiment.runner")
_forks.set_forkserver_preload([*_IMPORTED, "worker_processes"])


def _prepare(log: str, lease_pid: int) -> None:
    os.setsid()
    os.environ |= {"SPECSPLIT_LEASE_PID": str(lease_pid), "PYTHONHASHSEED": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _work(role: str, settings: dict[str, Any], endpoint_file: Path, log: str, lease_pid: int) -> None:
    from specsplit.settings.worker import DraftWorkerConfig, TargetWorkerConfig
    from specsplit.worker import server

    # Clients of campaigns look after their workers more often than a worker minds.
    server.SERVER_OPTIONS.append(("grpc.http2.min_ping_interval_without_data_ms", 100))
    _prepare(log, lease_pid)
    kind = DraftWorkerConfig if role == "draft" else TargetWorkerConfig
    server.serve(kind(**settings), endpoint_file=endpoint_file)


def _command(arguments: list[str], log: str, lease_pid: int, environment: dict[str, str]) -> None:
    from specsplit.cli.main import main

    _prepare(log, lease_pid)
    os.environ |= environment
    sys.argv = ["specsplit", *arguments]
    main(arguments)


class WorkerProcess:
    """A worker with one address over all its lives."""

    def __init__(self, role: str, model: Path, folder: Path, **settings: Any) -> None:
        defaults = {"port": 0, "threads": 1, "dtype": "float32", "max_context": 256, "drain_s": 0.2}
        self.role = role
        self.settings = {**defaults, "model": model, **settings}
        self.log = folder / f"{role}.log"
        self.pids: list[int] = []
        self._folder = folder
        self._process: BaseProcess | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.settings['port']}"

    @property
    def pid(self) -> int:
        return self.pids[-1]

    def start(self) -> None:
        """Start it, and wait until it serves."""
        file = self._folder / f"{self.role}-{len(self.pids)}.json"
        arguments = (self.role, self.settings, file, str(self.log), os.getpid())
        process: Any = _forks.Process(target=_work, args=arguments)
        process.start()
        self._process = process
        self.pids.append(process.pid)
        while not file.exists():
            assert process.is_alive(), self.log.read_text()
            time.sleep(0.01)
        self.settings["port"] = int(Endpoint.read(file).address.rpartition(":")[2])

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it by a signal and wait until it is gone."""
        assert self._process is not None
        os.kill(self.pid, number)
        self._process.join(20)
        assert not self._process.is_alive()

    def restart(self) -> None:
        """Kill it and start it again at its address."""
        self.kill()
        self.start()

    def close(self) -> None:
        if self._process is not None and self._process.is_alive():
            os.kill(self.pid, signal.SIGCONT)
            self.kill()


def start_command(*arguments: str | Path, log: Path, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """`specsplit ARGUMENTS` in the background. environment: variables beside those that there are."""
    given = ([str(a) for a in arguments], str(log), os.getpid(), dict(environment or {}))
    process = _forks.Process(target=_command, args=given)
    process.start()
    return process
