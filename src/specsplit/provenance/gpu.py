"""NVIDIA GPUs as nvidia-smi sees them."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from typing import Any

from specsplit.provenance.capture import run_tool

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


def capture_gpu(timeout_s: float = 30.0) -> dict[str, Any]:
    """State of every NVIDIA GPU: {available, reason, cuda_version, gpus: [...], raw}.

    Memory is MiB, clocks MHz, power watts; what a GPU does not report is null. raw: `nvidia-smi -q`.
    timeout_s: limit of each of the two calls; a broken driver can make nvidia-smi hang.
    """
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_COLUMNS)}", "--format=csv,noheader,nounits"]
    state: dict[str, Any] = {
        "available": False,
        "reason": None,
        "cuda_version": None,
        "gpus": [],
        "raw": None,
    }
    table, reason = run_tool(query, timeout_s)
    if table is None:
        return {**state, "reason": reason}
    rows = [row for row in csv.reader(table.splitlines(), skipinitialspace=True) if row]
    if not rows or any(len(row) != len(GPU_COLUMNS) for row in rows):
        return {**state, "reason": f"nvidia-smi: lists no GPU: {table.strip()[:200] or 'no output'}"}
    raw, reason = run_tool(["nvidia-smi", "-q"], timeout_s)
    cuda = re.search(r"^CUDA (?:\w+ )?Version\s*:\s*([\d.]+)", raw or "", re.MULTILINE)
    if raw is not None and cuda is None:
        reason = "nvidia-smi -q: names no CUDA version"
    gpus = [_gpu(row) for row in rows]
    return {"available": True, "reason": reason, "cuda_version": cuda and cuda[1], "gpus": gpus, "raw": raw}


def _gpu(row: Sequence[str]) -> dict[str, Any]:
    gpu: dict[str, Any] = {}
    for key, cell in zip(GPU_COLUMNS.values(), row, strict=True):
        text = cell.strip()
        if text.startswith("["):  # [N/A], [Not Supported], [Unknown Error]
            gpu[key] = None
        elif key.endswith(("_mib", "_mhz", "_w")):
            gpu[key] = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None
        else:
            gpu[key] = text
    return gpu
