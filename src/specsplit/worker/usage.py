"""What this process and its machine have used: CPU time, and energy where the machine tells it."""

from __future__ import annotations

import ctypes
import socket
import time
from pathlib import Path
from typing import Any

import torch

from specsplit.rpc.v1 import specsplit_pb2 as pb

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"


class UsageMeter:
    """device: of the model, as PyTorch names it; a GPU is metered as well as the processor.

    Energy is that of the whole processor (the RAPL counters of its packages and memory) and of the whole GPU (the
    counter of NVML, which nvidia-smi shows the power of), whatever runs on them. powercap, nvml: where these are.
    """

    def __init__(self, device: str, powercap: Path = POWERCAP, nvml: Any = NVML) -> None:
        self._device, self._nvml = device, nvml
        self._zones = sorted(powercap.glob("intel-rapl:*"))
        self._missing = f"{powercap} has no intel-rapl"
        self._last: dict[str, int] = {}
        self._joules: dict[str, float] = {}

    def read(self) -> pb.Usage:
        """CPU milliseconds of this process, and joules by what used them since the first call."""
        reasons = list(filter(None, (self._read_rapl(), self._read_gpu() if "cuda" in self._device else "")))
        return pb.Usage(cpu_ms=time.process_time() * 1e3, energy_j=self._joules, no_energy="; ".join(reasons))

    def _read_rapl(self) -> str:
        reason = self._missing
        for zone in self._zones:
            try:
                name = (zone / "name").read_text().strip()
                if not name.startswith(("package", "dram")):
                    continue
                count, wrap = (int((zone / file).read_text()) for file in ("energy_uj", "max_energy_range_uj"))
            except (OSError, ValueError) as error:
                reason = f"{zone}: {getattr(error, 'strerror', None) or error}"
                continue
            self._add(f"{socket.gethostname()} {zone.name} {name}", count, 1e-6, wrap)
            reason = ""
        return reason

    def _read_gpu(self) -> str:
        uuid = f"GPU-{torch.cuda.get_device_properties(self._device).uuid}"
        try:
            nvml = ctypes.CDLL(self._nvml) if isinstance(self._nvml, str) else self._nvml
        except OSError as error:
            return f"NVML: {error}"
        handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        status = (
            nvml.nvmlInit_v2()
            or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle))
            or nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        )
        if status:
            return f"NVML: status {status} for {uuid}"
        self._add(uuid, millijoules.value, 1e-3, 1 << 64)
        return ""

    def _add(self, domain: str, count: int, unit_j: float, wrap: int) -> None:
        """Take the new reading of a counter that begins anew at `wrap`."""
        since = (count - self._last.get(domain, count)) % wrap
        self._last[domain] = count
        self._joules[domain] = self._joules.get(domain, 0.0) + since * unit_j
