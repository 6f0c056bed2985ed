"""What a model card says of the machine."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from specsplit.launch.environment import usable_cores
from specsplit.provenance.capture import capture_machine


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """{name, device, threads, torch, transformers}; name: of the GPU, or of the processor with its threads."""
    threads = torch.get_num_threads()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpu = capture_machine()["cpu_model"] or "a processor that does not say its name"
        name = f"{cpu}, {threads} threads of {usable_cores()} cores, no GPU"
    return {
        "name": name,
        "device": device.type,
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
