"""Progress: a bar on a terminal, lines in a log."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, Self, TextIO

from tqdm import tqdm

from specsplit.errors import counted
from specsplit.experiment.columns import FAILED, RequestRecord


class Bar:
    """Counts towards `total`. Use as a context manager.

    A terminal at stderr gets a bar. Otherwise stdout, a log, gets a line for each call of `to` that is to be shown, and
    the terminal behind `terminal_fd`, where there is one, the bar.
    """

    def __init__(self, total: int, unit: str, terminal_fd: int | None = None, **options: Any) -> None:
        self._lines = not sys.stderr.isatty()
        terminal = _terminal(terminal_fd) if self._lines else sys.stderr
        options |= {"total": total, "unit": unit, "unit_scale": total >= 10_000, "dynamic_ncols": True}
        self._bar: tqdm[Any] = tqdm(leave=not self._lines, file=terminal, disable=terminal is None, **options)
        self._total, self._kept = total, 0
        self._began: tuple[int, float] | None = None  # the first call: work of an earlier process is no speed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def to(self, count: int, said: str = "", *, short: str | None = None, show: bool = True) -> None:
        """`count` of the total are done. said: what else there is to tell; short: in the bar. show: in the log."""
        self._bar.set_postfix_str(said if short is None else short, refresh=False)
        self._bar.update(min(count, self._total) + self._kept - self._bar.n)
        now = time.monotonic()
        if self._began is None:
            self._began = (count, now)
        if not (self._lines and show):
            return
        done = count - self._began[0]
        left = (now - self._began[1]) / done * max(0, self._total - count) if done > 0 else None
        words = [said, "" if left is None else f"about {_duration(left)} left"]
        print(f"[{count}/{self._total}]", ", ".join(filter(None, words)), flush=True)


class Progress(Bar):
    """Counts finished requests; call `done` with each request's record.

    A line of the log is about one request: its place, its speed, the speed of all so far, the time left.
    """

    def __init__(self, total: int, terminal_fd: int | None = None) -> None:
        super().__init__(total, "req", terminal_fd, mininterval=0)  # every request is shown, fast ones too
        self._count = self._failed = self._tokens = 0
        self._busy_ms = 0.0
        self._started = time.monotonic()
        self._began = (0, self._started)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if self._count:
            took = _duration(time.monotonic() - self._started)
            print(f"{self._count} of {counted(self._total, 'prompt')} in {took}: {self._speed()}", flush=True)
        if self._failed:
            print(
                f"{self._failed} failed: requests.csv says why; delete it and run again to try them again", flush=True
            )

    def kept(self, count: int) -> None:
        """So many are there already, from an earlier run."""
        self._total -= count
        self._kept += count
        self._bar.update(count)
        if count and self._lines:
            print(f"{count} done by an earlier run with the same settings are kept", flush=True)

    def done(self, record: RequestRecord) -> None:
        self._count += 1
        if record.status == FAILED:
            self._failed += 1
            said = f"failed: {record.error_message}"
        else:
            self._tokens += record.generated_tokens
            self._busy_ms += record.total_latency_ms
            speed = record.generated_tokens / record.total_latency_ms * 1e3
            said = f"{counted(record.generated_tokens, 'token')}, {speed:.1f} tokens/s; {self._speed()} so far"
        point = f"gamma {record.gamma}"
        self.to(self._count, f"{point} {record.request_id}: {said}", short=f"{point}, {self._speed()}")

    def _speed(self) -> str:
        return f"{self._tokens / self._busy_ms * 1e3:.1f} tokens/s" if self._busy_ms else "nothing finished"


def _terminal(fd: int | None) -> TextIO | None:
    """The terminal behind a file descriptor; None when there is none, as in a job of a cluster."""
    try:
        return os.fdopen(fd, "w", closefd=False) if fd is not None and os.isatty(fd) else None
    except OSError:
        return None


def _duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
