"""Hugging Face's ways to decode, in a process of their own, timed as ours are.

`generate` is the target alone, `assisted` speculative decoding with the draft as `assistant_model` (as the library has
it by default, or with a fixed number of drafted tokens), `prompt-lookup` drafts looked up in the text. All are greedy,
with the models, number formats and threads of the workers that they are raced against. The process waits on a pipe
while ours runs.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, Self

from specsplit.errors import UserError

PROMPT_LOOKUP_TOKENS = 10  # what the library's documentation uses


@dataclass(frozen=True)
class Peer:
    """One way to decode. draft_tokens: of assisted generation; None = as the library has it by default."""

    kind: str
    draft_tokens: int | None = None

    @classmethod
    def parse(cls, text: str) -> Peer:
        """generate | assisted | assisted-N | prompt-lookup. Raises ValueError."""
        kind, _, number = text.partition("-")
        if text in ("generate", "assisted", "prompt-lookup"):
            return cls(text)
        if kind == "assisted" and number.isdecimal() and int(number) > 0:
            return cls(kind, int(number))
        raise ValueError(f"{text!r} is none of generate, assisted, assisted-N, prompt-lookup")

    @property
    def label(self) -> str:
        """hf_generate, hf_assisted, hf_assisted_5, hf_prompt_lookup: its name in the tables."""
        number = "" if self.draft_tokens is None else f"_{self.draft_tokens}"
        return f"hf_{self.kind.replace('-', '_')}{number}"


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
    """

    output_tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    chunks: list[int] = field(default_factory=list)
    arrived_ms: list[float] = field(default_factory=list)
    ttft_ms: float | None = None

    @property
    def total_ms(self) -> float:
        return self.arrived_ms[-1]


class HuggingFace:
    """The process that runs the peers. Use as a context manager; one text at a time.

    target, draft: the models; draft may be None when no peer needs one. threads: compute threads.
    Raises UserError when a model cannot be loaded or a text cannot be written.
    """

    def __init__(self, target: PeerModel, draft: PeerModel | None, threads: int) -> None:
        self._arguments = target, draft, threads
        self.description: dict[str, Any] = {}  # of the process, as _Decoder.describe gives it

    def __enter__(self) -> Self:
        # Spawned, not forked: torch's threads and grpc's do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, *self._arguments), name="baselines", daemon=True)
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
        self._pipe.send(("write", (peer, list(prompt_ids), max_tokens, list(stop_ids))))
        return self._answer()

    def margin(self, context: Sequence[int], token: int, other: int) -> float:
        """The target's logit of `token` after `context` minus that of `other`: near 0, rounding decides."""
        self._pipe.send(("margin", (list(context), token, other)))
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer, error = self._pipe.recv()
        except EOFError:
            self._process.join(10)
            raise UserError(f"the process of the baselines ended with status {self._process.exitcode}") from None
        if error is not None:
            raise UserError(f"Hugging Face baseline: {error}")
        return answer


class _Chunks:
    """A streamer that notes when tokens come. Its first call gets the prompt."""

    def __init__(self, stop_ids: Sequence[int]) -> None:
        self.text = PeerText()
        self._stop_ids = stop_ids
        self._prompt = True
        self._started = time.perf_counter()

    def put(self, value: Any) -> None:
        now_ms = (time.perf_counter() - self._started) * 1e3
        if self._prompt:
            self._prompt = False
            return
        tokens = value.reshape(-1).tolist()
        ended = next((i for i, token in enumerate(tokens) if token in self._stop_ids), None)
        seen = tokens[:ended]
        text = self.text
        text.chunks.append(len(tokens))
        text.arrived_ms.append(now_ms)
        text.output_tokens += seen
        if seen and text.ttft_ms is None:
            text.ttft_ms = now_ms
        text.finish_reason = "length" if ended is None else "eos"

    def end(self) -> None:
        pass


def _serve(pipe: Pipe, target: PeerModel, draft: PeerModel | None, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent, whose end closes the pipe
    try:
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        decoder = _Decoder(_load(target), _load(draft) if draft is not None else None)
        pipe.send((decoder.describe(threads), None))
        while True:
            command, arguments = pipe.recv()
            pipe.send((getattr(decoder, command)(*arguments), None))
    except EOFError:
        return
    except Exception as error:
        pipe.send((None, f"{type(error).__name__}: {error}"))


def _load(spec: PeerModel) -> Any:
    """The library's model, computed by the library alone, but for int8 weights, which it does not have."""
    from transformers import GenerationConfig

    from specsplit.engines.quantise import quantise_linears
    from specsplit.engines.transformers import DTYPES, drop_layers, library_model

    model = library_model(spec.folder, DTYPES[spec.dtype])
    if spec.skip_layers:
        drop_layers(model, spec.skip_layers)
    model = model.to(spec.device).eval()
    if spec.dtype == "int8":
        quantise_linears(model)
    # Plain greedy decoding: no repetition penalty or the like that the model's authors recommend.
    model.generation_config = GenerationConfig()
    return model


class _Decoder:
    """What the process does."""

    def __init__(self, target: Any, draft: Any | None) -> None:
        self.target, self.draft = target, draft

    def describe(self, threads: int) -> dict[str, Any]:
        import torch
        import transformers

        defaults = transformers.GenerationConfig()._get_default_generation_params()
        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "threads": threads,
            "device": str(self.target.device),
            "attention": self.target.config._attn_implementation,
            "assisted_default": {key: value for key, value in defaults.items() if "assistant" in key},
            "prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS,
        }

    def write(self, peer: Peer, prompt_ids: list[int], max_tokens: int, stop_ids: list[int]) -> PeerText:
        import torch

        options: dict[str, Any] = {}
        if peer.kind == "assisted":
            assert self.draft is not None
            config = self.draft.generation_config
            fixed = peer.draft_tokens is not None
            config.num_assistant_tokens = peer.draft_tokens
            config.num_assistant_tokens_schedule = "constant" if fixed else None
            config.assistant_confidence_threshold = 0.0 if fixed else None
            options["assistant_model"] = self.draft
        elif peer.kind == "prompt-lookup":
            options["prompt_lookup_num_tokens"] = PROMPT_LOOKUP_TOKENS
        chunks = _Chunks(stop_ids)
        ids = torch.tensor([prompt_ids], device=self.target.device)
        with torch.inference_mode():
            self.target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                streamer=chunks,
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=stop_ids or None,
                pad_token_id=0,
                **options,
            )
        return chunks.text

    def margin(self, context: list[int], token: int, other: int) -> float:
        import torch

        with torch.inference_mode():
            logits = self.target(torch.tensor([context], device=self.target.device), logits_to_keep=1).logits[0, -1]
        return float(logits[token].float() - logits[other].float())
