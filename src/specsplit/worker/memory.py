"""How many sessions fit into memory, so that a worker refuses work instead of running out of memory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from specsplit.errors import UserError

if TYPE_CHECKING:
    from specsplit.engines.loading import LanguageModel
    from specsplit.settings.worker import WorkerSettings

log = logging.getLogger(__name__)
MIB = 1 << 20
CACHE_SHARE = 0.5  # of free memory: passes need some too, and the other worker may be on the same machine
CGROUP = Path("/sys/fs/cgroup")


def sessions_that_fit(config: WorkerSettings, model: LanguageModel, max_context: int, taps: int = 0) -> int:
    """max_sessions, or as many as fit into memory. taps: layers whose hidden states a cache may keep. Raises UserError
    when none does."""
    each = model.cache_bytes(max_context, taps)
    each += 4 * getattr(model, "state_size", 0) * max_context  # the states that a head was sent, in float32
    budget = config.cache_memory_mb * MIB if config.cache_memory_mb else int(CACHE_SHARE * free_memory(model.device))
    fitting = budget // max(each, 1)
    if fitting < 1:
        raise UserError(
            f"the cache of a session of {max_context} tokens takes {each / MIB:.0f} MiB, and there are "
            f"{budget / MIB:.0f} MiB for caches: lower max_context or raise cache_memory_mb"
        )
    if fitting < config.max_sessions:
        log.warning(
            "%d sessions instead of max_sessions %d: each takes %.0f MiB, and there are %.0f MiB for caches",
            fitting, config.max_sessions, each / MIB, budget / MIB,
        )  # fmt: skip
    return min(fitting, config.max_sessions)


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on the device; on the CPU within the limit of its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free: int = psutil.virtual_memory().available
    try:  # control groups version 2, as containers and SLURM use them
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        reclaimable = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return min(free, max(0, limit - used + int(reclaimable.get("inactive_file", 0))))
    except (OSError, ValueError):  # no such group, or "max": no limit
        return free
