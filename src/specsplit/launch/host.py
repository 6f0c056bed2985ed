"""What this machine and this Python are: processor, system, installed packages, driver of the GPUs."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

from specsplit.errors import why
from specsplit.launch.environment import usable_cores


def run_tool(command: Sequence[str], timeout_s: float, status: int = 0) -> tuple[str | None, str | None]:
    """What a program printed, as (output, None), or (None, the reason why there is nothing).

    status: the exit status that says that all went well.
    """
    name = command[0]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return None, f"{name}: no answer within {timeout_s:g} s"
    except OSError as error:
        return None, tool_missing(name, error)
    if done.returncode != status:
        message = " ".join((done.stderr.strip() or done.stdout.strip() or "no message").split())
        return None, f"{name}: exit status {done.returncode}: {message[:300]}"
    return done.stdout, None


def tool_missing(name: str, error: OSError) -> str:
    """Why a program could not be started."""
    return f"{name}: {'command not found' if isinstance(error, FileNotFoundError) else why(error)}"


def os_name() -> str:
    """The system in words, as `Debian GNU/Linux 12 (bookworm)`."""
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):  # not Linux, or without the file
        return platform.platform()


def cpu_model() -> str | None:
    """The model of the processor; None when the system does not say."""
    with suppress(OSError):
        # On x86; most ARM kernels do not tell.
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^model name\s*:\s*(.*\S)", cpuinfo, re.MULTILINE):
            return found[1]
    text, _ = run_tool(["sysctl", "-n", "machdep.cpu.brand_string"], 5.0)
    return (text and text.strip()) or platform.processor() or None


def installed_packages() -> dict[str, str]:
    """The version of every installed package, by its normalised name, sorted."""
    packages: dict[str, str] = {}
    for distribution in metadata.distributions():
        if name := distribution.metadata["Name"]:  # a half-removed package has none
            # The first one on sys.path is the one that is imported.
            packages.setdefault(normalised(name), distribution.version)
    return dict(sorted(packages.items()))


def normalised(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


@cache
def worker_host() -> dict[str, str]:
    """What Describe says of the host of a worker: processor, cores, system, driver, and all packages as JSON."""
    driver, _ = run_tool(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], 10.0)
    return {
        "cpu": cpu_model() or "unknown",
        "cores": str(usable_cores()),
        "os": os_name(),
        "kernel": f"{platform.system()} {platform.release()}",
        "driver": next(iter((driver or "").split()), "None"),
        "packages": json.dumps(installed_packages()),
    }
