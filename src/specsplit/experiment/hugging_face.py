"""Hugging Face's ways to decode: `generate`, assisted generation, prompt lookup."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from specsplit.experiment.peers import PROMPT_LOOKUP_TOKENS, Peer, PeerModel, PeerProcess, PeerText


class HuggingFace(PeerProcess):
    """The process that runs them.

    target, draft: the models; draft may be None when no peer needs one. threads: compute threads.
    """

    def __init__(self, target: PeerModel, draft: PeerModel | None, threads: int) -> None:
        super().__init__("Hugging Face", _Decoder, target, draft, threads)

    def margin(self, context: Sequence[int], token: int, other: int) -> float:
        """The target's logit of `token` after `context` minus that of `other`: near 0, rounding decides."""
        return float(self._ask("margin", list(context), token, other))


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
        self.text.take(value.reshape(-1).tolist(), now_ms, self._stop_ids)

    def end(self) -> None:
        pass


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

    def __init__(self, target: PeerModel, draft: PeerModel | None, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.threads = threads
        self.target, self.draft = _load(target), _load(draft) if draft is not None else None

    def describe(self) -> dict[str, Any]:
        import torch
        import transformers

        defaults = transformers.GenerationConfig()._get_default_generation_params()
        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "threads": self.threads,
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
