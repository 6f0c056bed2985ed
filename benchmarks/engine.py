"""How long a pass of the model takes, beside the memory floor and Hugging Face's.

    python benchmarks/engine.py --model resources/models/smollm2-135m-instruct

times a pass over 1, 2, 4, 8 and 16 tokens after a context, engine `fused` and engine `transformers` (the library's own
forward on our static cache) and the library alone (its dynamic cache) in turn, and how long it takes to read as many
bytes as the weights have, with the same threads. Prints medians in ms. Texts are random tokens: a pass takes the same
time for any.
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
from transformers import AutoModelForCausalLM

from specsplit.decoding.tree import TokenTree
from specsplit.engines.numba import FusedLM
from specsplit.engines.transformers import DTYPES, CausalLM
from specsplit.launch.environment import usable_cores

SIZES = (1, 2, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a prepared or local model")
    parser.add_argument("--dtype", default="float32", help="float32 | bfloat16 | int8 (default: float32)")
    parser.add_argument("--context", type=int, default=128, help="tokens before the pass (default: 128)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: every core")
    parser.add_argument("--repeats", type=int, default=15, help="passes of each kind that count (default: 15)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)

    ours = CausalLM.load(args.model, dtype=args.dtype, device="cpu")
    fused = FusedLM(CausalLM.load(args.model, dtype=args.dtype, device="cpu"), args.threads)
    vocab = fused.vocab_size
    context = [int(t) for t in np.random.default_rng(0).integers(0, vocab, args.context + max(SIZES))]
    passes = {"fused": step_of(fused, context, args.context), "transformers": step_of(ours, context, args.context)}
    if args.dtype != "int8":
        library = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype]).eval()
        passes["library"] = library_step(library, context, args.context)

    width = {"float32": 4, "bfloat16": 2, "int8": 1}[args.dtype]
    memory = torch.ones(fused.parameters * width // 4)
    floor = timed([memory.sum], args.repeats)[0]
    print(f"{args.dtype}, {args.threads} threads, {args.context} tokens before; medians in ms")
    print(f"memory floor ({memory.numel() * 4 / 1e6:.0f} MB of weights): {floor:.1f}")
    print(f"{'tokens':>6}" + "".join(f"{name:>14}" for name in passes) + f"{'fused/floor':>14}{'fused/last':>12}")
    for size in SIZES:
        times = timed([partial(step, size) for step in passes.values()], args.repeats)
        ratios = f"{times[0] / floor:14.2f}{times[0] / times[-1]:12.2f}"
        print(f"{size:6d}" + "".join(f"{t:14.1f}" for t in times) + ratios, flush=True)


def step_of(model: CausalLM | FusedLM, tokens: list[int], context: int) -> Callable[[int], object]:
    cache = model.new_cache(len(tokens))
    model.step(cache, tokens[:context])

    def step(size: int) -> object:
        cache.rollback(context)
        return model.step(cache, tokens[context : context + 1], TokenTree.chain(tokens[context + 1 : context + size]))

    return step


def library_step(model: torch.nn.Module, tokens: list[int], context: int) -> Callable[[int], object]:
    past = model(torch.tensor([tokens[:context]]), use_cache=True).past_key_values

    def step(size: int) -> object:
        if beyond := past.get_seq_length() - context:
            past.crop(-beyond)
        return model(torch.tensor([tokens[context : context + size]]), past_key_values=past, use_cache=True)

    return step


def timed(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median ms of each, in turn, so that what drifts meets all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 2):
        for call, kept in zip(calls, times, strict=True):
            time.sleep(0.02)  # threads of the one before stop waiting actively
            started = time.perf_counter()
            call()
            if turn >= 2:
                kept.append((time.perf_counter() - started) * 1e3)
    return [statistics.median(kept) for kept in times]


if __name__ == "__main__":
    main()
