"""Scratch folders: nothing of a killed process stays longer than until the next one needs such a folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from specsplit.io import scratch_folder

HOLD = (
    "import sys, time; from pathlib import Path; from specsplit.io import scratch_folder\n"
    "with scratch_folder('.model-', Path(sys.argv[1])) as folder:\n"
    "    (folder / 'weights').write_text('much')\n"
    "    print('on', flush=True)\n"
    "    time.sleep(60)\n"
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_scratch_folder_ends_with_its_block(tmp_path: Path) -> None:
    with scratch_folder("ours-", tmp_path) as folder:
        (folder / "deep").mkdir()
        assert folder.parent == tmp_path
        assert oct(folder.stat().st_mode & 0o777) == "0o700"
    with pytest.raises(ZeroDivisionError), scratch_folder("ours-", tmp_path):
        _ = 1 / 0
    assert names(tmp_path) == set()


def test_what_a_killed_process_left_goes_with_the_next_start(tmp_path: Path) -> None:
    (tmp_path / ".model-of-the-user").mkdir()  # no lock: not ours
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        with scratch_folder(".model-", tmp_path):
            assert len(names(tmp_path)) == 5  # two folders with their locks: one in use is left alone
        left = names(tmp_path)
        assert len(left) == 3
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert names(tmp_path) == left
        with scratch_folder(".model-", tmp_path) as folder:
            assert names(tmp_path) == {".model-of-the-user", folder.name, f"{folder.name}.lock"}
    finally:
        process.kill()
        process.communicate()
    assert names(tmp_path) == {".model-of-the-user"}


def test_many_at_once_each_have_their_own(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from specsplit.io import scratch_folder\n"
        "for _ in range(50):\n"
        "    with scratch_folder('ours-', Path(sys.argv[1])) as folder:\n"
        "        (folder / 'file').write_text('x')\n"
        "        assert (folder / 'file').read_text() == 'x'\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=os.environ) for _ in range(4)]
    assert [process.wait(60) for process in running] == [0] * 4
    assert names(tmp_path) == set()
