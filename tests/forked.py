"""`python -m MODULE` many times without importing its libraries each time.

One process has them imported and forks for each call. The package itself is not among them: each call imports its own.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

SNAKEMAKE = ("snakemake.cli", "pandas", "jsonschema", "pydantic", "yaml")
LIBRARIES = ("transformers", "transformers.models.llama.modeling_llama", "torch._inductor", "numba", "grpc", "pandas")
_SERVER = """
import importlib, json, os, runpy, sys

for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, file in enumerate((os.devnull, asked["stdout"], asked["stderr"])):
        os.dup2(os.open(file, os.O_RDWR), number)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ |= asked["environment"]
    sys.path[:0] = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = [asked["module"], *asked["arguments"]]
    sys.modules.pop("sitecustomize", None)  # the server's own, which Debian's Python has
    try:
        import sitecustomize
    except ImportError:
        pass
    runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
    break
"""


@cache
def _server(libraries: tuple[str, ...]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _SERVER, *libraries]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    return process


def run_module(
    module: str,
    arguments: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    libraries: tuple[str, ...],
) -> subprocess.CompletedProcess[str]:
    """What subprocess.run gives for `python -m module arguments`, with stdout and stderr as texts."""
    server = _server(libraries)
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as place:
        files = {name: Path(place) / name for name in ("stdout", "stderr")}
        for file in files.values():
            file.touch()
        asked = {
            **{"module": module, "arguments": list(arguments), "folder": str(folder)},
            **{"environment": dict(environment), **{name: str(file) for name, file in files.items()}},
        }
        print(json.dumps(asked), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        stdout, stderr = (file.read_text() for file in files.values())
    return subprocess.CompletedProcess([module, *arguments], code, stdout, stderr)
