"""Lines of a log: text, and JSON where a worker is asked for it."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from specsplit import logs
from specsplit.cli import main as cli
from specsplit.errors import UserError
from specsplit.launch.environment import REQUIRED
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.worker import TargetWorkerConfig
from specsplit.worker.server import load_servicer

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """What makes this process one that does not log yet; pytest logs while a test runs."""
    monkeypatch.delenv(logs.VARIABLE, raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield lambda: monkeypatch.setattr(root, "handlers", [])
    root.setLevel(level)
    logging.captureWarnings(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


class Aborted(Exception):
    pass


class Call:
    """As much of a gRPC context as a handler that refuses asks for."""

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return [("traceparent", f"00-{TRACE}-b7ad6b7169203331-01")]

    def is_active(self) -> bool:
        return True

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def cancel(self) -> None:
        pass

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise Aborted


def test_json_has_the_fields_of_a_request(
    tiny_model_folder: Callable[..., Path],
    bare: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"model": tiny_model_folder("llama"), "threads": 1, "max_context": 64, "dtype": "float32"}
    servicer = load_servicer(TargetWorkerConfig(**settings))
    monkeypatch.setenv(logs.VARIABLE, "json")
    bare()
    logs.set_up("worker")
    assert logs.is_json()
    capsys.readouterr()  # the bar of loading, which the command turns off
    request = pb.VerifyDraftsRequest(context=pb.Context(session_id="sess\nion-and-more", round=7, new_tokens=[999]))
    with pytest.raises(Aborted):
        servicer.VerifyDrafts(request, Call())
    monkeypatch.setattr(servicer, "answer", lambda *_: 1 / 0)
    request.context.new_tokens[0] = 5
    with pytest.raises(Aborted):
        servicer.VerifyDrafts(request, Call())
    servicer.model.close()
    refused, failed = (line for line in lines(capsys) if line["logger"].endswith(".servicer"))
    about = {"session": r"sess\nion", "round": 7, "trace_id": TRACE}
    when = datetime.fromisoformat(refused.pop("time"))
    assert when.tzinfo is UTC
    assert refused == {
        "level": "INFO",
        "logger": "specsplit.worker.servicer",
        "message": r"refused INVALID_ARGUMENT: token id 999 is outside the vocabulary of 128 session=sess\nion round=7",
        **about,
    }
    assert failed.items() >= {"level": "ERROR", "message": r"request failed session=sess\nion round=7", **about}.items()
    assert failed["traceback"].startswith("Traceback")
    assert failed["traceback"].endswith("ZeroDivisionError: division by zero")


def test_json_is_all_that_a_worker_prints(
    bare: Callable[[], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare()
    for name, value in REQUIRED.items():
        monkeypatch.setenv(name, value)  # or the command would start this process anew
    with pytest.raises(SystemExit) as ended:
        cli.main(["worker", "target", "--log-format", "json", "--port", "0", "--model", "/nowhere"])
    assert ended.value.code == 2
    warnings.warn("of a library\nin two lines", stacklevel=1)
    sys.excepthook(*_error())
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    error, warning, crash, crashed_thread = lines(capsys)
    assert (error["level"], error["logger"]) == ("ERROR", "specsplit.cli.main")
    assert "/nowhere" in error["message"]
    assert "session" not in error
    assert "of a library\nin two lines" in warning["message"]
    for line in (crash, crashed_thread):
        assert line["level"] == "CRITICAL"
        assert line["traceback"].endswith("ZeroDivisionError: division by zero")


def _error() -> Any:
    try:
        return 1 / 0
    except ZeroDivisionError:
        return sys.exc_info()


def test_text_is_the_default_and_other_commands_have_nothing_else(
    bare: Callable[[], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare()
    logs.set_up("worker")
    logging.getLogger("specsplit.x").info("one")
    bare()
    monkeypatch.setenv(logs.VARIABLE, "json")
    logs.set_up("generate")
    logging.getLogger("specsplit.x").info("two")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(" INFO specsplit.x: one")
    assert second == "two"
    assert not logs.is_json()


def test_another_format_is_refused(bare: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    bare()
    monkeypatch.setenv(logs.VARIABLE, "yaml")
    with pytest.raises(UserError, match="--log-format / SPECSPLIT_LOG_FORMAT = 'yaml': write text or json"):
        logs.set_up("worker")


def test_of_a_collector_that_cannot_be_reached_is_told_once(
    bare: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    bare()
    logs.set_up("generate")
    exporter = logging.getLogger("opentelemetry.exporter")
    exporter.warning("retrying")
    for _ in range(3):
        exporter.error("failed to export")
    logging.getLogger("opentelemetrics").warning("another one")
    assert capsys.readouterr().err.splitlines() == ["failed to export", "another one"]


def test_start_worker_hands_the_format_on(
    tiny_model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[str]] = []

    def start(role: str, arguments: list[str], **_: Any) -> None:
        given.append(arguments)
        raise UserError("enough")

    monkeypatch.setattr("specsplit.launch.start.start_worker", start)
    flags = ["--endpoint-file", str(tmp_path / "e.json"), "--worker-log", str(tmp_path / "log"), "--model"]
    for more in ([], ["--log-format", "json"]):
        with pytest.raises(SystemExit):
            cli.main(["start-worker", "target", *flags, str(tiny_model_folder("llama")), *more])
    assert "--log-format" not in given[0]
    assert given[1][-2:] == ["--log-format", "json"]
