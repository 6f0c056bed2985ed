"""Progress of a benchmark: a bar on a terminal, a line a request in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from specsplit.bench.metrics import RequestRecord


class Progress:
    """Counts finished requests. Use as a context manager; call `done` with each request's record."""

    def __init__(self, total: int) -> None:
        self._bar = tqdm(total=total, unit="req", dynamic_ncols=True, disable=not sys.stderr.isatty())
        self._total = total
        self._count = 0
        self._started = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def done(self, record: RequestRecord) -> None:
        self._count += 1
        speed = record.generated_tokens / record.total_latency_ms * 1e3
        if not self._bar.disable:
            self._bar.set_postfix_str(f"gamma {record.gamma}, {speed:.1f} tokens/s", refresh=False)
            self._bar.update()
            return
        left = (time.monotonic() - self._started) / self._count * (self._total - self._count)
        print(
            f"[{self._count}/{self._total}] gamma {record.gamma} {record.request_id}: "
            f"{record.generated_tokens} tokens, {speed:.1f} tokens/s, about {left:.0f} s left",
            flush=True,
        )
