"""What a result was made with: machine, software, source code, environment variables.

Every capture returns a dict that JSON can hold. What cannot be had is null with the reason beside it; nothing
here fails because a tool is missing.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import specsplit
from specsplit.hashing import sha256_file
from specsplit.jsonio import json_sha256
from specsplit.workers.environment import REQUIRED

ENVIRONMENT_VARIABLES = (
    *REQUIRED,
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "HF_HUB_OFFLINE",
)


def utc_now() -> str:
    """The time now, as ISO 8601 in UTC: 2025-01-31T12:00:00.123456Z."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def run_tool(command: Sequence[str], timeout_s: float) -> tuple[str | None, str | None]:
    """What a program printed, as (output, None), or (None, the reason why there is nothing)."""
    name = command[0]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except FileNotFoundError:
        return None, f"{name}: command not found"
    except subprocess.TimeoutExpired:
        return None, f"{name}: no answer within {timeout_s:g} s"
    except OSError as error:
        return None, f"{name}: {error.strerror or error}"
    if done.returncode:
        said = " ".join((done.stderr.strip() or done.stdout.strip() or "no message").split())
        return None, f"{name}: exit status {done.returncode}: {said[:300]}"
    return done.stdout, None


# ---- the machine


def capture_machine() -> dict[str, Any]:
    """Host name, operating system, processor, memory (bytes), Python, and PyTorch.

    torch.threads is that of this process; a worker may have been told another number.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return {
        "hostname": platform.node(),
        "os": _os_name(),
        "kernel": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu_model": _cpu_model(),
        "cores_logical": psutil.cpu_count(logical=True),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_usable": len(affinity(0)) if affinity else psutil.cpu_count(logical=True),
        "memory_bytes": psutil.virtual_memory().total,
        "python": sys.version,
        "torch": _torch(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):  # not a Linux, or one without the file
        return platform.platform()


def _cpu_model() -> str | None:
    try:
        # x86 says "model name"; most ARM kernels say nothing of the kind.
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    text, _ = run_tool(["sysctl", "-n", "machdep.cpu.brand_string"], 5.0)
    return (text and text.strip()) or platform.processor() or None


def _torch() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        return {"available": False, "reason": f"torch cannot be imported: {error}"}
    return {
        "available": True,
        "reason": None,
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "build": torch.__config__.show().strip(),
        "parallel": torch.__config__.parallel_info().strip(),
    }


# ---- the software


def capture_software() -> dict[str, Any]:
    """Python, Snakemake, SpecSplit, and the version of every installed package, with a hash over them."""
    packages: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # a half-removed package has none
            # The first one on sys.path is the one that is imported.
            packages.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    packages = dict(sorted(packages.items()))
    return {
        "python": platform.python_version(),
        "specsplit": specsplit.__version__,
        "snakemake": packages.get("snakemake"),
        "packages": packages,
        "sha256": json_sha256(packages),
    }


def capture_environment() -> dict[str, Any]:
    """The variables that decide whether a run can be repeated exactly; null = not set."""
    values: dict[str, Any] = {name: os.environ.get(name) for name in ENVIRONMENT_VARIABLES}
    return {**values, "hash_randomization": bool(sys.flags.hash_randomization)}


def hash_source_tree(root: Path) -> str:
    """One sha256 over every file under `root`, by relative path and content; compiled Python is left out."""
    digest = hashlib.sha256()
    # as_posix: the same order and the same hash on every system.
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    for name, path in sorted(paths.items()):
        if "__pycache__" not in path.relative_to(root).parts:
            digest.update(f"{sha256_file(path)}  {name}\n".encode())
    return digest.hexdigest()
