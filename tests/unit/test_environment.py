"""Which GPUs a worker sees, how many cores it may use, and what gRPC is told."""

from __future__ import annotations

import importlib
import os
from importlib import metadata
from pathlib import Path

import pytest

import specsplit
from specsplit.errors import UserError
from specsplit.launch import environment
from specsplit.launch.environment import own_gpu


@pytest.mark.parametrize(
    ("gpus", "visible", "target", "draft"),
    [
        (0, "3", None, None),
        (1, None, "0", "0"),
        (2, None, "0", "1"),
        (1, "2,3", "2", "2"),
        (2, "GPU-a,GPU-b,GPU-c", "GPU-a", "GPU-b"),
    ],
)
def test_gpus_are_shared_or_one_each(gpus: int, visible: str | None, target: str | None, draft: str | None) -> None:
    assert own_gpu("target", gpus, visible) == target
    assert own_gpu("draft", gpus, visible) == draft


@pytest.mark.parametrize("visible", ["", "1"])
def test_fewer_gpus_than_the_run_takes(visible: str) -> None:
    with pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES={visible} shows . GPUs where the run takes 2"):
        own_gpu("draft", 2, visible)


# ---- quotas of control groups: what is in /proc/self/cgroup and below /sys/fs/cgroup -> cores of 8

QUOTAS: list[tuple[str, dict[str, str], int]] = [
    ("0::/\n", {}, 8),
    ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
    ("0::/\n", {"cpu.max": "150000 100000\n"}, 1),
    ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
    ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
    ("0::/\n", {"cpu.max": "9900000 100000\n"}, 8),
    ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, 2),
    ("0::/host/path\n", {"cpu.max": "300000 100000"}, 3),  # of a container, seen from outside
    ("4:cpu,cpuacct:/job\n0::/\n", {"cpu/job/cpu.cfs_quota_us": "350000", "cpu/job/cpu.cfs_period_us": "100000"}, 3),
    ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "not a number", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ("4:memory:/x\n", {"x/cpu.max": "100000 100000"}, 8),
]


@pytest.mark.parametrize(("groups", "files", "cores"), QUOTAS)
def test_a_quota_bounds_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], cores: int
) -> None:
    mount = tmp_path / "cgroup"
    for name, content in files.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(content)
    (tmp_path / "self").write_text(groups)
    monkeypatch.setattr(environment, "CGROUP_MOUNT", mount)
    monkeypatch.setattr(environment, "CGROUPS_OF_PROCESS", tmp_path / "self")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert environment.usable_cores() == cores


def test_without_control_groups_the_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "CGROUPS_OF_PROCESS", tmp_path / "none")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(3)), raising=False)
    assert environment.usable_cores() == 3


@pytest.mark.parametrize(
    ("version", "own", "told"),
    [
        ("1.85.1", None, "-event_engine_client,-event_engine_listener"),
        ("1.85.1", "", ""),
        ("1.86.0", None, None),
        (None, None, None),
    ],
)
def test_grpc_has_the_pollers_that_are_quick(
    version: str | None, own: str | None, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", installed)
    monkeypatch.delenv("GRPC_EXPERIMENTS")
    if own is not None:
        monkeypatch.setenv("GRPC_EXPERIMENTS", own)
    importlib.reload(specsplit)
    assert os.environ.pop("GRPC_EXPERIMENTS", None) == told
