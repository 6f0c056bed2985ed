"""NVIDIA GPUs as nvidia-smi sees them: their state, and samples of it while something runs."""

from __future__ import annotations

import csv
import re
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Self

from specsplit.io import utc_text
from specsplit.launch.host import run_tool, tool_missing
from specsplit.launch.process import end_process

# nvidia-smi's name for each column, and ours.
GPU_COLUMNS = {
    "name": "name",
    "uuid": "uuid",
    "driver_version": "driver_version",
    "memory.total": "memory_total_mib",
    "pstate": "pstate",
    "clocks.sm": "clocks_sm_mhz",
    "clocks.mem": "clocks_mem_mhz",
    "power.draw": "power_draw_w",
}
SAMPLE_COLUMNS = {
    "power.draw": "power_draw_w",
    "clocks.sm": "clocks_sm_mhz",
    "utilization.gpu": "utilization_percent",
    "temperature.gpu": "temperature_c",
}
SAMPLE_PERIOD_S = 1.0
FORMAT = "--format=csv,noheader,nounits"


def capture_gpu(timeout_s: float = 30.0) -> dict[str, Any]:
    """State of every NVIDIA GPU: {available, reason, cuda_version, gpus: [...], raw}.

    Memory is MiB, clocks MHz, power watts; what a GPU does not report is null, and its `reason` says so. raw:
    `nvidia-smi -q`. timeout_s: limit of each of the two calls; a broken driver can make nvidia-smi hang.
    """
    nothing: dict[str, Any] = {"available": False, "reason": None, "cuda_version": None, "gpus": [], "raw": None}
    table, reason = run_tool(["nvidia-smi", f"--query-gpu={','.join(GPU_COLUMNS)}", FORMAT], timeout_s)
    if table is None:
        return {**nothing, "reason": reason}
    rows = [row for row in csv.reader(table.splitlines(), skipinitialspace=True) if row]
    if not rows or any(len(row) != len(GPU_COLUMNS) for row in rows):
        return {**nothing, "reason": f"nvidia-smi: lists no GPU: {table.strip()[:200] or 'no output'}"}
    raw, reason = run_tool(["nvidia-smi", "-q"], timeout_s)
    cuda = re.search(r"^CUDA (?:\w+ )?Version\s*:\s*([\d.]+)", raw or "", re.MULTILINE)
    if raw is not None and cuda is None:
        reason = "nvidia-smi -q: names no CUDA version"
    gpus = [_gpu(row) for row in rows]
    return {"available": True, "reason": reason, "cuda_version": cuda and cuda[1], "gpus": gpus, "raw": raw}


def _gpu(row: Sequence[str]) -> dict[str, Any]:
    gpu: dict[str, Any] = {}
    missing = []
    for (column, key), cell in zip(GPU_COLUMNS.items(), row, strict=True):
        unknown = not cell or cell.startswith("[")  # [N/A], [Not Supported], [Unknown Error]
        gpu[key] = _number(cell) if key.endswith(("_mib", "_mhz", "_w")) else None if unknown else cell.strip()
        if gpu[key] is None:
            missing.append(f"{column} is {cell.strip() or 'empty'}")
    return {**gpu, "reason": f"nvidia-smi: {', '.join(missing)}" if missing else None}


def _number(cell: str) -> float | None:
    return float(cell) if re.fullmatch(r"\s*\d+(\.\d+)?\s*", cell) else None


class GpuSampler:
    """Samples the GPUs from `with` to its end, by one nvidia-smi in the background.

    `samples` afterwards: {available, reason, period_s, gpus: [{uuid, time: [UTC...], power_draw_w: [...], ...}]}.
    """

    def __init__(self, period_s: float = SAMPLE_PERIOD_S) -> None:
        self.samples: dict[str, Any] = {"available": False, "reason": None, "period_s": period_s, "gpus": []}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        query = f"--query-gpu=uuid,timestamp,{','.join(SAMPLE_COLUMNS)}"
        loop = f"--loop-ms={round(self.samples['period_s'] * 1e3)}"
        # A file, not a pipe: it is read at the end only, and a full pipe would block nvidia-smi.
        self._output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        try:
            self._process = subprocess.Popen(
                ["nvidia-smi", query, FORMAT, loop],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        except OSError as error:
            self.samples["reason"] = tool_missing("nvidia-smi", error)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            end_process(self._process)
            self._output.seek(0)
            self._read(self._output.read())
        self._output.close()

    def _read(self, text: str) -> None:
        gpus: dict[str, dict[str, Any]] = {}
        for row in csv.reader(text.splitlines(), skipinitialspace=True):
            if len(row) != len(SAMPLE_COLUMNS) + 2 or (time := _utc_time(row[1])) is None:
                continue  # a message, or the line that it was writing at the end
            gpu = gpus.setdefault(row[0], {"uuid": row[0], "time": [], **{key: [] for key in SAMPLE_COLUMNS.values()}})
            gpu["time"].append(time)
            for key, cell in zip(SAMPLE_COLUMNS.values(), row[2:], strict=True):
                gpu[key].append(_number(cell))
        self.samples["gpus"] = list(gpus.values())
        self.samples["available"] = bool(gpus)
        if not gpus:
            self.samples["reason"] = f"nvidia-smi: no sample: {' '.join(text.split())[:200] or 'no output'}"


def _utc_time(text: str) -> str | None:
    """nvidia-smi writes the local time: 2025/01/31 13:00:00.123."""
    try:
        return utc_text(datetime.strptime(text.strip(), "%Y/%m/%d %H:%M:%S.%f").astimezone(UTC))
    except ValueError:
        return None
