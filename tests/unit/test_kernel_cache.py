"""Compiled functions on disk: processes that compile at once, and folders that cannot be read or written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from specsplit.engines import kernel_cache
from specsplit.engines.kernel_cache import _Files

SOURCE = """
from specsplit.engines.kernel_cache import kernel

@kernel()
def double(x):
    return x + x
"""


@pytest.fixture
def process(tmp_path: Path) -> Callable[[], Any]:
    """`double`, as another process imports it."""
    file = tmp_path / "doubling.py"
    file.write_text(SOURCE)

    def imported() -> Any:
        spec = util.spec_from_file_location("doubling", file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["doubling"] = util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.double

    return imported


def test_versions_compiled_at_once_are_not_taken_for_each_other(
    process: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both read the index before the other one wrote it, and one writes its file after the other is done.
    write, others = _Files._save_data, iter([1.5])

    def write_late(self: _Files, name: str, data: Any) -> None:
        for value in others:
            process()(value)
        write(self, name, data)

    with monkeypatch.context() as patched:
        patched.setattr(_Files, "_load_index", lambda self: {})
        patched.setattr(_Files, "_save_data", write_late)
        assert process()(2) == 4
    later = process()
    assert (later(1.5), later(2)) == (3, 4)


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_a_damaged_file_is_compiled_again(process: Callable[[], Any], tmp_path: Path, ending: str) -> None:
    process()(2)
    (file,) = tmp_path.glob(f"__pycache__/*.{ending}")
    file.write_bytes(file.read_bytes()[:20])
    assert process()(2) == 4
    whole = process()
    assert whole(2) == 4
    assert sum(whole.stats.cache_hits.values()) == 1


def test_without_room_on_the_disk_kernels_are_compiled_all_the_same(
    process: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    kernel_cache._warn.cache_clear()
    monkeypatch.setattr(_Files, "_save_data", full)
    assert process()(2) == 4
    assert "No space left on device): set NUMBA_CACHE_DIR" in caplog.text
