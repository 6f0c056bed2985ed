"""Progress: a bar on a terminal, lines in a log."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

from specsplit.experiment.columns import FAILED, RequestRecord


class Progress:
    """Counts finished requests. Use as a context manager; call `done` with each request's record.

    A terminal at stderr gets a bar. Otherwise stdout, a log, gets a line for each request: its place, its speed, the
    speed of all so far, the time left; and the terminal behind `terminal_fd`, where there is one, the bar.
    """

    def __init__(self, total: int, terminal_fd: int | None = None) -> None:
        self._lines = not sys.stderr.isatty()
        # Every request is shown, fast ones too.
        self._bar = _make_bar(self._lines, terminal_fd, total=total, unit="req", mininterval=0)
        self._total = total
        self._count = 0
        self._failed = 0
        self._tokens = 0
        self._busy_ms = 0.0
        self._started = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._count:
            print(f"{self._count} of {self._total} prompts in {_lasting(self._elapsed())}: {self._speed()}", flush=True)
        if self._failed:
            print(
                f"{self._failed} failed: requests.csv says why; delete it and run again to try them again", flush=True
            )

    def kept(self, count: int) -> None:
        """So many are there already, of an earlier run."""
        self._total -= count
        self._bar.update(count)
        if count and self._lines:
            print(f"{count} done by an earlier run with the same settings are kept", flush=True)

    def done(self, record: RequestRecord) -> None:
        self._count += 1
        if record.status == FAILED:
            self._failed += 1
            self._bar.update()
            if self._lines:
                print(
                    f"[{self._count}/{self._total}] gamma {record.gamma} {record.request_id}: failed: "
                    f"{record.error_message}",
                    flush=True,
                )
            return
        self._tokens += record.generated_tokens
        self._busy_ms += record.total_latency_ms
        self._bar.set_postfix_str(f"gamma {record.gamma}, {self._speed()}", refresh=False)
        self._bar.update()
        if not self._lines:
            return
        left = self._elapsed() / self._count * (self._total - self._count)
        speed = record.generated_tokens / record.total_latency_ms * 1e3
        own = f"{record.generated_tokens} tokens, {speed:.1f} tokens/s"
        print(
            f"[{self._count}/{self._total}] gamma {record.gamma} {record.request_id}: {own}; "
            f"{self._speed()} so far, about {_lasting(left)} left",
            flush=True,
        )

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _speed(self) -> str:
        return f"{self._tokens / self._busy_ms * 1e3:.1f} tokens/s" if self._busy_ms else "nothing finished"


class Bar:
    """Counts towards `total`. Use as a context manager.

    A terminal at stderr gets a bar. Otherwise stdout, a log, gets a line for each call of `to` that is to be shown, and
    the terminal behind `terminal_fd`, where there is one, the bar.
    """

    def __init__(self, total: int, unit: str, terminal_fd: int | None = None) -> None:
        self._lines = not sys.stderr.isatty()
        self._bar = _make_bar(self._lines, terminal_fd, total=total, unit=unit, unit_scale=total >= 10_000)
        self._total = total
        self._began: tuple[int, float] | None = None  # where the first call was: work of an earlier process is no speed

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def to(self, count: int, said: str = "", *, show: bool = True) -> None:
        """`count` of the total are done. said: what else there is to tell. show: in the log."""
        self._bar.set_postfix_str(said, refresh=False)
        self._bar.update(min(count, self._total) - self._bar.n)
        now = time.monotonic()
        if self._began is None:
            self._began = (count, now)
        if not (self._lines and show):
            return
        done = count - self._began[0]
        left = (now - self._began[1]) / done * max(0, self._total - count) if done > 0 else None
        words = [said, "" if left is None else f"about {_lasting(left)} left"]
        print(f"[{count}/{self._total}]", ", ".join(filter(None, words)), flush=True)


def _make_bar(in_log: bool, terminal_fd: int | None, **options: Any) -> tqdm[Any]:
    terminal = _terminal(terminal_fd) if in_log else sys.stderr
    return tqdm(dynamic_ncols=True, leave=not in_log, file=terminal, disable=terminal is None, **options)


def _terminal(fd: int | None) -> TextIO | None:
    """The terminal behind a file descriptor; None when there is none, as in a job of a cluster."""
    try:
        return os.fdopen(fd, "w", closefd=False) if fd is not None and os.isatty(fd) else None
    except OSError:
        return None


def _lasting(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
