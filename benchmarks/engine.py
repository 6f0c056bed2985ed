"""How long a pass of the model takes, in every form of weights, beside the memory floor and Hugging Face's.

    python benchmarks/engine.py --model resources/models/smollm2-135m-instruct

times a pass over 1 to 16 tokens after a context, and prompts, in engine `fused` with weights in each form that the
folder allows (`stored`, of a GGUF file, is the one that workers take), in engine `transformers` (the library's own
forward on our static cache) and in the library alone (its dynamic cache), in turn. `floor` is how long it takes to read
as many bytes as the weights have, with the same threads. Prints medians in ms and, in brackets, how many times a pass
over one token each takes; --least prints the least times instead, for a machine that others use too. Texts are random
tokens: a pass takes the same time for any.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from specsplit.decoding.tree import TokenTree
from specsplit.engines.numba import FusedLM
from specsplit.engines.transformers import CausalLM, library_model
from specsplit.launch.environment import usable_cores
from specsplit.models.fingerprint import gguf_weights

SIZES = (1, 2, 3, 4, 5, 6, 8, 12, 16)
FORMS = ("float32", "bfloat16", "int8", "stored")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a prepared or local model")
    parser.add_argument("--forms", nargs="+", choices=FORMS, help="of weights in engine fused (default: all)")
    parser.add_argument("--context", type=int, default=128, help="tokens before the pass (default: 128)")
    parser.add_argument("--prompts", type=int, nargs="*", default=[64, 256, 512], help="lengths (default: 64 256 512)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: every core")
    parser.add_argument("--repeats", type=int, default=15, help="passes of each kind that count (default: 15)")
    parser.add_argument("--no-peers", action="store_true", help="without transformers")
    parser.add_argument("--least", action="store_true", help="the least times instead of medians")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    forms = args.forms or [form for form in FORMS if form != "stored" or gguf_weights(args.model)]
    summary = min if args.least else statistics.median

    passes, floors = {}, {}
    vocab = 0
    tokens: list[int] = []
    for form in forms:
        model = FusedLM(load(args.model, form), args.threads)
        if not tokens:
            vocab = model.vocab_size
            length = max(args.context + max(SIZES), *args.prompts, 1)
            tokens = [int(t) for t in np.random.default_rng(0).integers(0, vocab, length)]
        passes[form] = step_of(model, tokens, args.context)
        floors[form] = np.ones(model.weight_bytes // 4, np.float32)
    if not args.no_peers:
        ours = CausalLM.load(args.model, device="cpu")
        passes["transformers"] = step_of(ours, tokens, args.context)
        passes["library"] = library_step(library_model(args.model, torch.float32).eval(), tokens, args.context)

    print(f"{args.threads} threads, {args.context} tokens before; {'least' if args.least else 'median'} ms")
    for form, memory in floors.items():
        floor = timed([torch.from_numpy(memory).sum], args.repeats, summary)[0]
        print(f"floor of {form}: {floor:.1f} ({memory.nbytes / 1e6:.0f} MB)")
    print(f"{'tokens':>8}" + "".join(f"{name:>20}" for name in passes))
    ones: list[float] = []
    for size in SIZES:
        times = timed([partial(step, size, False) for step in passes.values()], args.repeats, summary)
        ones = ones or times
        print(f"{size:8d}" + "".join(f"{t:12.1f} ({t / one:5.2f})" for t, one in zip(times, ones, strict=True)))
    for size in args.prompts:
        times = timed([partial(step, size, True) for step in passes.values()], max(args.repeats // 4, 1), summary)
        print(f"{f'all {size}':>8}" + "".join(f"{t:20.1f}" for t in times), flush=True)


def load(folder: Path, form: str) -> CausalLM:
    return CausalLM.load_blocks(folder) if form == "stored" else CausalLM.load(folder, dtype=form, device="cpu")


def step_of(model: CausalLM | FusedLM, tokens: list[int], context: int) -> Callable[[int, bool], object]:
    cache = model.new_cache(len(tokens))

    def step(size: int, prompt: bool) -> object:
        if prompt:
            return model.step(model.new_cache(size), tokens[:size])
        if cache.length < context:
            model.step(cache, tokens[cache.length : context])
        cache.rollback(context)
        return model.step(cache, tokens[context : context + 1], TokenTree.chain(tokens[context + 1 : context + size]))

    return step


def library_step(model: torch.nn.Module, tokens: list[int], context: int) -> Callable[[int, bool], object]:
    past = model(torch.tensor([tokens[:context]]), use_cache=True).past_key_values

    def step(size: int, prompt: bool) -> object:
        if prompt:
            return model(torch.tensor([tokens[:size]]), use_cache=True, logits_to_keep=1)
        if beyond := past.get_seq_length() - context:
            past.crop(-beyond)
        return model(torch.tensor([tokens[context : context + size]]), past_key_values=past, use_cache=True)

    return step


def timed(calls: list[Callable[[], object]], repeats: int, summary: Callable[[list[float]], float]) -> list[float]:
    """ms of each, in turn, so that what drifts meets all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 2):
        for call, kept in zip(calls, times, strict=True):
            time.sleep(0.02)  # threads of the one before stop waiting actively
            started = time.perf_counter()
            call()
            if turn >= 2:
                kept.append((time.perf_counter() - started) * 1e3)
    return [summary(kept) for kept in times]


if __name__ == "__main__":
    main()
