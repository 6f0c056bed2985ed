"""Other programs that decode, each in a process of its own, timed as ours are.

Hugging Face's ways (hugging_face.py) are `generate`, the target alone; `assisted`, speculative decoding with the draft
as `assistant_model` (as the library has it by default, or with a fixed number of drafted tokens); and `prompt-lookup`,
drafts looked up in the text. Those of llama.cpp (llama_cpp.py) are `llama.cpp`, the target alone, `llama.cpp-draft` and
`llama.cpp-prompt-lookup`. All are greedy, with the models and threads of the workers that they are raced against. A
process waits on a pipe while the others run.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, Self

from specsplit.errors import RunError

HUGGING_FACE, LLAMA_CPP = "transformers", "llama.cpp"  # engines, as the tables call them
PROMPT_LOOKUP_TOKENS = 10  # what Hugging Face's documentation uses
KINDS = {
    "generate": "hf_generate",
    "assisted": "hf_assisted",
    "prompt-lookup": "hf_prompt_lookup",
    "llama.cpp": "llama_cpp",
    "llama.cpp-draft": "llama_cpp_draft",
    "llama.cpp-prompt-lookup": "llama_cpp_prompt_lookup",
}


@dataclass(frozen=True)
class Peer:
    """One way to decode. draft_tokens: of assisted generation; None = as the library has it by default."""

    kind: str
    draft_tokens: int | None = None

    @classmethod
    def parse(cls, text: str) -> Peer:
        """One of KINDS, or assisted-N for N drafted tokens, as the setting `baseline` has them."""
        if text in KINDS:
            return cls(text)
        kind, _, number = text.partition("-")
        return cls(kind, int(number))

    @property
    def label(self) -> str:
        """hf_generate, hf_assisted_5, llama_cpp_draft: its name in the tables."""
        return KINDS[self.kind] + ("" if self.draft_tokens is None else f"_{self.draft_tokens}")

    @property
    def engine(self) -> str:
        return LLAMA_CPP if self.kind.startswith(LLAMA_CPP) else HUGGING_FACE

    @property
    def wants_draft(self) -> bool:
        """Whether it decodes with the draft of the workers."""
        return self.kind in ("assisted", "llama.cpp-draft")


@dataclass(frozen=True)
class PeerModel:
    """A folder of weights and how it is loaded. dtype, skip_layers: as a worker's. device: as torch names it."""

    folder: Path
    dtype: str
    device: str
    skip_layers: tuple[int, ...] = ()


@dataclass
class PeerText:
    """A finished text, its times in ms from the start of the request. The end-of-text token is left out of the tokens.

    chunks: tokens that came together, those that the user does not see included; arrived_ms: when each came.
    passes: of the target; None: as many as chunks.
    """

    output_tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    chunks: list[int] = field(default_factory=list)
    arrived_ms: list[float] = field(default_factory=list)
    ttft_ms: float | None = None
    passes: int | None = None

    @property
    def total_ms(self) -> float:
        return self.arrived_ms[-1]

    @property
    def first(self) -> int:
        """How many tokens came first, at ttft_ms."""
        return min(self.chunks[0], len(self.output_tokens))

    @property
    def rounds(self) -> int:
        return len(self.chunks) if self.passes is None else self.passes

    def take(self, tokens: Sequence[int], now_ms: float, stop_ids: Sequence[int]) -> bool:
        """Add tokens that came together at `now_ms`; whether one of them ended the text."""
        ended = next((i for i, token in enumerate(tokens) if token in stop_ids), None)
        seen = tokens[:ended]
        self.chunks.append(len(tokens))
        self.arrived_ms.append(now_ms)
        self.output_tokens += seen
        if seen and self.ttft_ms is None:
            self.ttft_ms = now_ms
        self.finish_reason = "length" if ended is None else "eos"
        return ended is not None


class PeerProcess:
    """The process in which a peer runs. Use as a context manager; one text at a time.

    name: in messages. make: makes, in the process, what answers: `describe()` and `write(...)`, each called with what
    the methods here are given. Raises UserError when a model cannot be loaded or a text cannot be written.
    """

    def __init__(self, name: str, make: Callable[..., Any], *arguments: Any) -> None:
        self.name, self._make, self._arguments = name, make, arguments
        self.description: dict[str, Any] = {}  # what `describe` said

    def __enter__(self) -> Self:
        # Spawned, not forked: torch's threads and grpc's do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        arguments = other, self._make, self._arguments
        self._process = context.Process(target=_serve, args=arguments, name="baselines", daemon=True)
        self._process.start()
        other.close()
        try:
            self.description = self._answer()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join(10)

    def write(self, peer: Peer, prompt_ids: Sequence[int], *, max_tokens: int, stop_ids: Sequence[int]) -> PeerText:
        """One greedy text of at most `max_tokens` tokens, which ends at one of stop_ids (empty: at none)."""
        return self._ask("write", peer, list(prompt_ids), max_tokens, list(stop_ids))

    def _ask(self, command: str, *arguments: Any) -> Any:
        with suppress(OSError):  # of a process that is gone; `_answer` says so
            self._pipe.send((command, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer, error = self._pipe.recv()
        except (EOFError, OSError):  # it is gone
            self._process.join(10)
            raise RunError(f"the process of the {self.name} baseline {_ended(self._process.exitcode)}") from None
        if error is not None:
            raise RunError(f"{self.name} baseline: {error}")
        return answer


def _ended(status: int | None) -> str:
    if status is None or status >= 0:
        return f"ended with status {status}"
    memory = ": out of memory? Use a smaller model, or fewer baselines" if -status == signal.SIGKILL else ""
    return f"was ended by signal {-status}{memory}"


def _serve(pipe: Pipe, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent, whose end closes the pipe
    try:
        decoder = make(*arguments)
        pipe.send((decoder.describe(), None))
        while True:
            command, arguments = pipe.recv()
            pipe.send((getattr(decoder, command)(*arguments), None))
    except EOFError:
        return
    except Exception as error:
        pipe.send((None, f"{type(error).__name__}: {error}"))
