"""What the steps of a distillation need: a process that computes the same every time, threads, target, machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from specsplit.errors import UserError, counted

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def prepare_process(seed: int, threads: int | None) -> None:
    """What every step needs of its process: the same numbers every time."""
    from specsplit.launch.environment import ensure_deterministic_environment, usable_cores

    ensure_deterministic_environment()
    import torch
    import transformers

    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(threads or usable_cores())
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def find_target(path: Path) -> tuple[Path, dict[str, Any]]:
    """The target's folder, and what identifies it. UserError when it has no weights to learn from."""
    from specsplit.models.sources import resolve_model
    from specsplit.models.weightless import is_weightless

    folder, manifest = resolve_model(path)
    if is_weightless(manifest["source"]):
        raise UserError(f"--target {path} is a {manifest['source']['source']} model; a draft is made of weights")
    known = ("weights_sha256", "tokenizer_sha256", "vocab_size")
    return folder, {"model": manifest["name"], **{key: manifest["fingerprint"][key] for key in known}}


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """What a model card says of the machine: {name, device, threads, torch, transformers}.

    name: of the GPU, or of the processor with its threads.
    """
    import torch
    import transformers

    from specsplit.launch.environment import usable_cores
    from specsplit.launch.host import cpu_model

    threads = torch.get_num_threads()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpu = cpu_model() or "a processor that does not say its name"
        name = f"{cpu}, {counted(threads, 'thread')} of {counted(usable_cores(), 'core')}, no GPU"
    return {
        "name": name,
        "device": device.type,
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@contextmanager
def fits_memory(field: str, value: int) -> Iterator[None]:
    """What is too much for the memory of a GPU is a setting to mend."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise UserError(f"--{field.replace('_', '-')} {value} is too much for this GPU, take less: {reason}") from None


class Team:
    """Threads that each compute a part of a batch alone: on a CPU they do more than by sharing every product.

    As many as PyTorch may use, one on a GPU. The same parts come in the same order every time.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self.size = torch.get_num_threads() if device.type == "cpu" else 1
        self._threads = ThreadPoolExecutor(self.size, initializer=torch.set_num_threads, initargs=(1,))

    def split(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        """As many parts as threads, of about the same length, none of them empty."""
        ends = [len(items) * i // self.size for i in range(self.size + 1)]
        return [items[start:end] for start, end in pairwise(ends) if end > start]

    def map(self, function: Callable[..., Result], *parts: Sequence[object]) -> list[Result]:
        """As `map`, in the threads."""
        return list(self._threads.map(function, *parts))
