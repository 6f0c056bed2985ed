"""How many sessions the memory holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specsplit.engines.numba import FusedLM
from specsplit.engines.synthetic import SyntheticLM
from specsplit.engines.transformers import CausalLM
from specsplit.errors import UserError
from specsplit.settings.worker import TargetWorkerConfig
from specsplit.worker import memory
from specsplit.worker.memory import MIB, free_memory, sessions_that_fit

from tiny_models import ARCHITECTURES

CPU = torch.device("cpu")


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "fused", "synthetic"])
def test_the_size_of_a_cache_is_known_before_it_is_made(tiny_model: Callable[..., Any], architecture: str) -> None:
    model: Any
    if architecture == "synthetic":
        model = SyntheticLM()
    elif architecture == "fused":
        model = FusedLM(CausalLM(tiny_model("llama")), 1)
    else:
        model = CausalLM(tiny_model(architecture))
    cache = model.new_cache(32)
    model.step(cache, [5, 6])
    assert model.cache_bytes(32) == cache.nbytes()


class Sized(SyntheticLM):
    def cache_bytes(self, capacity: int, taps: int = 0) -> int:
        return MIB * capacity


@pytest.mark.parametrize(("memory_mb", "sessions"), [(800, 8), (1000, 8), (799, 7), (100, 1)])
def test_as_many_sessions_as_fit(memory_mb: int, sessions: int, caplog: pytest.LogCaptureFixture) -> None:
    config = TargetWorkerConfig.load({"cache_memory_mb": memory_mb})
    assert sessions_that_fit(config, Sized(), 100) == sessions
    assert ("sessions instead of max_sessions 8: each takes 100 MiB" in caplog.text) is (sessions < 8)


def test_a_session_that_does_not_fit_is_a_user_error() -> None:
    config = TargetWorkerConfig.load({"cache_memory_mb": 99})
    with pytest.raises(
        UserError, match=r"100 tokens takes 100 MiB, and there are 99 MiB for caches: lower max_context"
    ):
        sessions_that_fit(config, Sized(), 100)


def test_half_of_what_is_free_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000 * MIB)
    assert sessions_that_fit(TargetWorkerConfig.load(), Sized(), 100) == 5


def test_a_control_group_limits_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    whole = free_memory(CPU)  # no such group
    assert whole > 16 * MIB
    (tmp_path / "memory.current").write_text(f"{10 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {2 * MIB}\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) > 16 * MIB
    (tmp_path / "memory.max").write_text(f"{16 * MIB}\n")
    assert free_memory(CPU) == 8 * MIB
    (tmp_path / "memory.current").write_text(f"{20 * MIB}\n")
    assert free_memory(CPU) == 0
