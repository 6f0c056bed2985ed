"""What a result was made with: machine, software, source code, environment variables.

Every capture returns a dict that JSON can hold. What cannot be had is null, and `reason` of the same dict says why;
nothing here fails because a tool is missing.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

import specsplit
from specsplit.errors import why
from specsplit.io import json_sha256, sha256_file, utc_text
from specsplit.launch.environment import DETERMINISM_VARIABLES
from specsplit.launch.host import cpu_model, installed_packages, normalised, os_name

ENVIRONMENT_VARIABLES = (*DETERMINISM_VARIABLES, "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE")
LOCK = Path("envs/constraints.txt")
# What decides a result beside the package, relative to the project's folder.
WORKFLOW_FILES = ("Snakefile", "workflow/**/*", "profiles/**/*", "envs/*", "pyproject.toml")


def utc_now() -> str:
    """The time now, as ISO 8601 in UTC: 2025-01-31T12:00:00.123456Z."""
    return utc_text(datetime.now(UTC), "microseconds")


# ---- the machine


def capture_machine() -> dict[str, Any]:
    """Host name, operating system, processor, memory (bytes), Python, and PyTorch.

    torch.threads is that of this process; a worker may have been told another number.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return with_reason(
        {
            "hostname": platform.node(),
            "os": os_name(),
            "kernel": f"{platform.system()} {platform.release()}",
            "architecture": platform.machine(),
            "cpu_model": cpu_model(),
            "cores_logical": psutil.cpu_count(logical=True),
            "cores_physical": psutil.cpu_count(logical=False),
            "cores_usable": len(affinity(0)) if affinity else psutil.cpu_count(logical=True),
            "memory_bytes": psutil.virtual_memory().total,
            "python": sys.version,
            "torch": _torch(),
        },
        "the system does not say",
    )


def with_reason(captured: dict[str, Any], reason: str) -> dict[str, Any]:
    """`captured` with a `reason` that names its nulls; null when there are none."""
    missing = [key for key, value in captured.items() if value is None]
    return {**captured, "reason": f"{', '.join(missing)}: {reason}" if missing else None}


def _torch() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        return {"available": False, "reason": f"torch cannot be imported: {error}"}
    captured = {
        "available": True,
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "build": torch.__config__.show().strip(),
        "parallel": torch.__config__.parallel_info().strip(),
    }
    return with_reason(captured, "PyTorch was built without CUDA")


# ---- the software


def capture_software() -> dict[str, Any]:
    """Python, Snakemake, SpecSplit, and the version of every installed package, with a hash over them."""
    packages = installed_packages()
    captured = {
        "python": platform.python_version(),
        "specsplit": specsplit.__version__,
        "snakemake": packages.get("snakemake"),
        "packages": packages,
        "sha256": json_sha256(packages),
    }
    return with_reason(captured, "not installed")


def capture_lock(root: Path, packages: Mapping[str, str]) -> dict[str, Any]:
    """The file of pinned versions in the project at `root`: {path, sha256, differs, reason}.

    differs: {package: {installed, locked}} of the packages that are installed in another version. A local version
    label (+cpu) makes no difference.
    """
    try:
        text = (root / LOCK).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return {"path": LOCK.as_posix(), "sha256": None, "differs": None, "reason": f"{LOCK}: {why(error)}"}
    locked = {normalised(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}
    differs = {
        name: {"installed": packages[name], "locked": version}
        for name, version in sorted(locked.items())
        if name in packages and packages[name].partition("+")[0] != version.partition("+")[0]
    }
    return {"path": LOCK.as_posix(), "sha256": sha256_file(root / LOCK), "differs": differs, "reason": None}


def capture_environment() -> dict[str, Any]:
    """The variables that decide whether a run can be repeated exactly; null = not set."""
    values: dict[str, Any] = {name: os.environ.get(name) for name in ENVIRONMENT_VARIABLES}
    return {**values, "hash_randomization": bool(sys.flags.hash_randomization)}


# ---- the source code


def hash_tree(root: Path, patterns: Sequence[str] = ("**/*",)) -> dict[str, str]:
    """sha256 of the files under `root` that match, by relative path, sorted; compiled Python is left out."""
    paths = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    # as_posix: the same order and the same hash on every system.
    names = {path.relative_to(root).as_posix(): path for path in paths if "__pycache__" not in path.parts}
    return {name: sha256_file(path) for name, path in sorted(names.items())}
