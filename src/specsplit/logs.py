"""Logging of the commands: lines of text; of a worker also JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from specsplit.errors import UserError

FORMATS = ("text", "json")
VARIABLE = "SPECSPLIT_LOG_FORMAT"
FIELDS = ("session", "round", "trace_id")  # the `extra` of a line about a request
NOISY = ("httpx", "urllib3", "matplotlib")
log = logging.getLogger(__name__)


def set_up(command: str, log_format: str | None = None) -> None:
    """Log to standard error in the format of the command.

    log_format: of a worker's lines, one of FORMATS; default: SPECSPLIT_LOG_FORMAT, or text. Raises UserError.
    """
    formatter = logging.Formatter("%(message)s")
    if command == "worker":
        log_format = log_format or os.environ.get(VARIABLE) or "text"
        if log_format not in FORMATS:
            raise UserError(f"--log-format / {VARIABLE} = {log_format!r}: write {' or '.join(FORMATS)}")
        formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        if log_format == "json":
            formatter = JsonFormatter()
            _log_warnings_and_tracebacks()
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    handler.addFilter(FirstProblem("opentelemetry"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)


def is_json() -> bool:
    """Whether this process logs JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, FIELDS where they are known, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": when.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # ASCII: one line, and readable whatever the terminal's encoding


class FirstProblem(logging.Filter):
    """Passes only the first error of that logger and those below it.

    The exporter of spans logs every attempt at a collector that cannot be reached.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._logged = False

    def filter(self, record: logging.LogRecord) -> bool:
        if not super().filter(record):
            return True
        passes = record.levelno >= logging.ERROR and not self._logged
        self._logged = self._logged or passes
        return passes


def _log_warnings_and_tracebacks() -> None:
    """Log what Python would print to standard error."""
    logging.captureWarnings(True)

    def failed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        log.critical("failed: %s", kind.__name__, exc_info=(kind, error, trace))

    def failed_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            failed(args.exc_type, args.exc_value, args.exc_traceback)

    sys.excepthook = failed
    threading.excepthook = failed_thread
