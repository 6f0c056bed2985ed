"""Which GPUs a worker sees."""

from __future__ import annotations

import pytest

from specsplit.errors import UserError
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
