"""CPU time and energy: what counters say, and the differences that a run records."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch
from pandas import DataFrame

from specsplit.analysis.costs import cost_sentences, with_price
from specsplit.experiment.usage import Meter
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.measure import PriceSettings
from specsplit.worker.usage import UsageMeter


def zone(powercap: Path, number: str, name: str, microjoules: int) -> Path:
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir(parents=True, exist_ok=True)
    for file, value in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", 10_000_000)):
        (folder / file).write_text(f"{value}\n")
    return folder


def test_energy_of_packages_and_memory_and_a_counter_that_begins_anew(tmp_path: Path) -> None:
    readings = [(9_000_000, 100), (9_500_000, 2_100), (500_000, 2_100)]
    meter = None
    for package, dram in readings:
        zone(tmp_path, "0", "package-0", package)
        zone(tmp_path, "0:0", "core", 7 * package)  # a part of the package
        zone(tmp_path, "0:1", "dram", dram)
        meter = meter or UsageMeter("cpu", tmp_path)
        used = meter.read()
    assert sorted(used.energy_j.values()) == pytest.approx([0.002, 1.5])
    assert used.no_energy == ""


def test_a_machine_that_tells_no_energy_says_why(tmp_path: Path) -> None:
    used = UsageMeter("cpu", tmp_path).read()
    assert (dict(used.energy_j), used.no_energy) == ({}, f"{tmp_path} has no intel-rapl")
    folder = zone(tmp_path, "0", "package-0", 1)
    (folder / "energy_uj").unlink()
    (folder / "energy_uj").mkdir()
    assert UsageMeter("cpu", tmp_path).read().no_energy == f"{folder}: Is a directory"


class Nvml:
    """Of one GPU, which has used `millijoules`."""

    millijoules, status = 5_000, 0

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        return 0 if uuid == b"GPU-1-2" else 6

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, to: Any) -> int:
        ctypes.cast(to, ctypes.POINTER(ctypes.c_ulonglong))[0] = self.millijoules
        return self.status


def test_energy_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    nvml = Nvml()
    meter = UsageMeter("cuda:0", tmp_path, nvml)
    meter.read()
    nvml.millijoules += 2_500
    assert dict(meter.read().energy_j) == {"GPU-1-2": 2.5}
    nvml.status = 3
    assert "NVML: status 3 for GPU-1-2" in meter.read().no_energy
    assert "NVML: " in UsageMeter("cuda:0", tmp_path, "libnothing.so").read().no_energy


class Worker:
    """A stub that tells these usages one after the other; None: it is gone."""

    def __init__(self, role: str, *usages: pb.Usage | None) -> None:
        self.role, self.stub, self._usages = role, self, list(usages)

    def Describe(self, request: pb.DescribeRequest, timeout: float) -> pb.DescribeReply:
        assert request.usage
        usage = self._usages.pop(0)
        if usage is None:
            raise grpc.RpcError
        return pb.DescribeReply(usage=usage)


def used(cpu_ms: float, **joules: float) -> pb.Usage:
    return pb.Usage(cpu_ms=cpu_ms, energy_j=joules, no_energy="" if joules else "nothing to read")


def meter(*workers: Any) -> Meter:
    return Meter(workers)


def test_workers_of_one_machine_share_its_energy() -> None:
    draft = Worker("draft", used(10, a=1, gpu=0), used(25, a=5, gpu=3))
    measured = meter(draft, Worker("target", used(100, a=1), used(400, a=6)))
    spent = measured.spent()
    assert (spent["draft_cpu_ms"], spent["target_cpu_ms"], spent["energy_j"]) == (15, 300, 8)
    assert spent["client_cpu_ms"] >= 0


def test_what_is_not_told_is_empty_with_its_reason() -> None:
    measured = meter(Worker("draft", None, used(5)), Worker("target", used(100), used(400)))
    assert measured.told() == {
        "of": [],
        "left_out": {"target": "nothing to read", "draft": "it does not tell its usage"},
    }
    spent = measured.spent()
    assert (spent["draft_cpu_ms"], spent["target_cpu_ms"], spent["energy_j"]) == (None, 300, None)
    anew = meter(Worker("target", used(100), used(3)))
    assert anew.spent() | {"client_cpu_ms": 0} == {
        "client_cpu_ms": 0,
        "draft_cpu_ms": 0,
        "target_cpu_ms": None,
        "energy_j": None,
    }


def a_summary() -> DataFrame:
    link = {f"{role}_{way}_bytes_per_token": 10.0 for role in ("draft", "target") for way in ("sent", "received")}
    row = {"setup": "workers", "tokens_per_second": 100.0, "client_cpu_ms_per_token": 1.0, **link}
    rows = [{**row, "gamma": 0}, {**row, "gamma": 4, "tokens_per_second": 200.0}]
    return DataFrame([*rows, {**row, "gamma": 4, "setup": "colocated"}])


@pytest.mark.parametrize(
    ("prices", "expected"),
    [
        ({}, [None, None, None]),
        ({"target_price": 3.6}, [10, None, 10]),  # a million tokens take 10,000 seconds
        ({"target_price": 3.6, "draft_price": 0.36}, [10, 5.5, 10]),
    ],
)
def test_price_of_a_million_tokens(prices: dict[str, float], expected: list[float | None]) -> None:
    summary = with_price(a_summary(), PriceSettings(**prices))
    price = summary["price_per_million_tokens"]
    assert [None if value != value else pytest.approx(value) for value in price] == expected
    if "draft_price" in prices:  # of many clients, whose rows have no setup: the last one drafts as well
        loads = with_price(summary.drop(columns="setup"), PriceSettings(**prices))["price_per_million_tokens"]
        assert list(loads) == pytest.approx([10, 5.5, 11])
    told = " ".join(cost_sentences(summary))
    assert ("Price of a million tokens: with the target alone 10.0" in told) == bool(prices)
    assert "CPU milliseconds per token: with the target alone client 1.00; with a draft client 1.00 (" in told
    assert "Joules" not in told
    assert "nan" not in told
