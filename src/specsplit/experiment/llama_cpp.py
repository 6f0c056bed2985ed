"""llama.cpp's ways to decode, from the package xllamacpp (extra `peers`): alone, with a draft, with prompt lookup.

Its server runs in a process of its own, with the GGUF file, the threads and the context of our target worker; the rest
is as it comes. It multiplies quantised weights by activations of 8 bits, so its texts are not always those of the
float32 target: the race says where they part.
"""

from __future__ import annotations

import http.client
import json
import time
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from specsplit.experiment.peers import PROMPT_LOOKUP_TOKENS, Peer, PeerProcess, PeerText

PACKAGE = "xllamacpp"
LOOKUP_NGRAM = 3  # tokens that must be found earlier in the text; its own default of 12 finds next to nothing


def installed() -> bool:
    return find_spec(PACKAGE) is not None


class LlamaCpp(PeerProcess):
    """The process that runs one of them.

    target, draft: GGUF files; the draft of `llama.cpp-draft` alone. threads: compute threads. context: tokens that a
    text can have.
    """

    def __init__(self, peer: Peer, target: Path, draft: Path | None, threads: int, context: int) -> None:
        super().__init__("llama.cpp", _Decoder, peer, target, draft, threads, context)


class _Decoder:
    """What the process does."""

    def __init__(self, peer: Peer, target: Path, draft: Path | None, threads: int, context: int) -> None:
        xllamacpp = import_module(PACKAGE)
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(target)
        parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = context, 1, 0
        parameters.cache_ram_mib = 0  # no prompt is kept from one text to the next
        parameters.verbosity = -1
        for own in (parameters.cpuparams, parameters.cpuparams_batch):
            own.n_threads = threads
        speculative, types = parameters.speculative, xllamacpp.common_speculative_type
        if peer.kind == "llama.cpp-draft":
            speculative.types = [types.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
            speculative.draft.mparams.path = str(draft)
            for own in (speculative.draft.cpuparams, speculative.draft.cpuparams_batch):
                own.n_threads = threads
        elif peer.kind == "llama.cpp-prompt-lookup":
            speculative.types = [types.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
            speculative.ngram_simple.size_n, speculative.ngram_simple.size_m = LOOKUP_NGRAM, PROMPT_LOOKUP_TOKENS
        self._server = xllamacpp.Server(parameters)
        self._address = self._server.listening_address.removeprefix("http://")
        self._about = {
            PACKAGE: version(PACKAGE),
            "threads": threads,
            "system": xllamacpp.get_system_info(),
            "draft_tokens": speculative.draft.n_max if draft else None,
            "lookup_ngram": LOOKUP_NGRAM,
            "prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS,
        }

    def describe(self) -> dict[str, Any]:
        return self._about

    def write(self, peer: Peer, prompt_ids: list[int], max_tokens: int, stop_ids: list[int]) -> PeerText:
        asked = {
            "prompt": prompt_ids,
            "n_predict": max_tokens,
            "stream": True,
            "return_tokens": True,
            "cache_prompt": False,
            "temperature": 0,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": not stop_ids,
        }
        text, last, ended = PeerText(), {}, False
        connection = http.client.HTTPConnection(self._address)
        started = time.perf_counter()
        try:
            connection.request("POST", "/completion", json.dumps(asked), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != http.client.OK:
                raise RuntimeError(f"status {answer.status}: {answer.read().decode(errors='replace')[:500]}")
            for line in answer:
                if not line.startswith(b"data: "):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                now_ms = (time.perf_counter() - started) * 1e3
                if event["stop"] or ended:  # closing the connection ends what the server would write on
                    last = event
                    break
                if event["tokens"]:
                    ended = text.take(event["tokens"], now_ms, stop_ids)
        finally:
            connection.close()
        # Tokens that were accepted came out of the pass of the token before them.
        text.passes = sum(text.chunks) - last.get("timings", {}).get("draft_n_accepted", 0)
        return text
