"""The exit status of a command says what happened: the table of docs/commands.md, row by row."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specsplit.errors import RunError, UserError, WorkerError
from specsplit.experiment.peers import Peer, PeerProcess

CODE = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins without it
import specsplit.cli.merge as command
from specsplit import errors
from specsplit.cli.main import main
def run(args):
{body}
command.run = run
main(["merge", "--results-dir", "x"])
"""


def ends(body: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command that does this."""
    code = CODE.format(body="\n".join(f"    {line}" for line in body.splitlines()))
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", **options}
    return subprocess.run([sys.executable, "-c", code], check=False, **options)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("print('done')", 0, ""),
        ("raise errors.RunError('every request failed')", 1, "every request failed"),
        ("raise errors.WorkerError('lost', result=object())", 1, "lost"),
        ("raise errors.WorkerError('no worker there')", 2, "no worker there"),
        ("raise MemoryError", 1, "out of memory"),
        ("raise KeyError('odd')", 1, "KeyError: 'odd' (--debug shows where"),
        ("raise BrokenPipeError('another process')", 2, "another process"),
        ("raise errors.UserError('mend it')", 2, "mend it"),
        ("open('/nothing/here')", 2, "/nothing/here"),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(5)", 130, ""),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)", 143, ""),
    ],
)  # fmt: skip
def test_each_row_of_the_table(body: str, status: int, said: str) -> None:
    done = ends(body)

    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert done.stderr.count("error: ") == (1 if said else 0)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("body", "status"),
    [("print('x')", 0), ("print('x', flush=True)\ntime.sleep(5)", 1)],
    ids=["at the end", "before the end"],
)
def test_a_reader_that_is_gone(body: str, status: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        done = ends(body, stdout=closed)

    assert done.returncode == status
    assert ("standard output was closed before the command was done" in done.stderr) == bool(status)
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8", "cp1252"])
def test_every_encoding_of_the_output(encoding: str) -> None:
    done = ends("print('γ = 0 → 漢字')", env={**os.environ, "PYTHONIOENCODING": encoding}, encoding=encoding)

    assert (done.returncode, done.stderr) == (0, "")
    assert "= 0" in done.stdout


@pytest.mark.parametrize("environment", [{"LC_ALL": "C"}, {"COLUMNS": "1"}, {"COLUMNS": "x", "TERM": "dumb"}])
def test_every_locale_and_width(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "specsplit", "bench", "--help"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, check=False)

    assert (done.returncode, done.stderr) == (0, b"")


def test_without_any_output() -> None:
    code = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, '-m', 'specsplit', *sys.argv[1:]])"
    done = subprocess.run(
        [sys.executable, "-c", code, "merge", "--results-dir", "none"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_the_table_of_the_documentation_is_of_these() -> None:
    table = Path(__file__, "../../../docs/commands.md").resolve().read_text().partition("## Exit status")[2]
    rows = [line.split("|")[1].strip() for line in table.partition("\n## ")[0].splitlines() if line.startswith("| ")]

    assert rows == ["status", "0", "1", "1", "2", str(128 + signal.SIGINT), str(128 + signal.SIGTERM)]
    assert (UserError.exit_status, RunError.exit_status, WorkerError("x").exit_status) == (2, 1, 2)


class Decoder:
    """What answers in the process of a baseline."""

    def describe(self) -> dict[str, str]:
        return {"pid": str(os.getpid())}

    def write(self, *arguments: Any) -> None:
        raise ZeroDivisionError(arguments[1])


def test_a_baseline_whose_process_dies_is_a_failure() -> None:
    with PeerProcess("transformers", Decoder) as peer:
        with pytest.raises(RunError, match=r"transformers baseline: ZeroDivisionError: \[5\]"):
            peer.write(Peer.parse("generate"), [5], max_tokens=1, stop_ids=[])
        os.kill(int(peer.description["pid"]), signal.SIGKILL)
        for _ in range(2):  # found dead, and known to be
            with pytest.raises(RunError, match="the process of the transformers baseline was ended by signal 9"):
                peer.write(Peer.parse("generate"), [5], max_tokens=1, stop_ids=[])
