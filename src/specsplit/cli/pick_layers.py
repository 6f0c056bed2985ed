"""specsplit pick-layers"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from specsplit.errors import UserError


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="the target, prepared or local")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="JSONL of prompts to search on")
    parser.add_argument("--count", type=int, required=True, metavar="K", help="layers to skip")
    parser.add_argument("--limit", type=int, default=8, metavar="N", help="prompts of the file to use (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=48, metavar="M", help="tokens written for each (default: 48)")
    parser.add_argument("--edge", type=int, default=1, metavar="N", help="layers kept at either end (default: 1)")
    parser.add_argument(
        "--shortlist", type=int, metavar="N", help="after the first layer, try only the N best of that search"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="what was found, as JSON")
    parser.add_argument("--use-chat-template", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--dtype", default="bfloat16", help="of the search, as the draft will have it (default: bfloat16)"
    )
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="compute threads (default: every core it may use)")


def run(args: argparse.Namespace) -> None:
    import torch

    from specsplit.engines.layer_search import Step, search_layers
    from specsplit.engines.transformers import CausalLM
    from specsplit.experiment.dataset import load_prompts, select_prompts
    from specsplit.io import sha256_file, write_json
    from specsplit.models.sources import resolve_model
    from specsplit.models.tokenizer import TextCodec

    for flag, least in (("max_tokens", 1), ("edge", 0), ("threads", 1)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag.replace('_', '-')} {value}: wanted a whole number >= {least}")
    prompts = select_prompts(load_prompts(args.prompts)[0], args.limit)
    folder, manifest = resolve_model(args.model)
    if "weights_sha256" not in manifest["fingerprint"]:
        raise UserError(f"--model {args.model} has no weights, so no layers: name a model with weights")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = CausalLM.load(folder, dtype=args.dtype, device=args.device)
    codec = TextCodec.load(folder)

    def show_candidate(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total}", end="\r" if done < total else "\r\033[K", file=sys.stderr, flush=True)

    def show_step(step: Step) -> None:
        print(f"skip layer {step.layer}: agreement {step.agreement:.3f}, skipped {step.skipped}", flush=True)

    steps = search_layers(
        model,
        [codec.encode(prompt.prompt, use_chat_template=args.use_chat_template) for prompt in prompts],
        count=args.count,
        max_tokens=args.max_tokens,
        edge=args.edge,
        shortlist=args.shortlist,
        on_candidate=show_candidate,
        on_step=show_step,
    )
    if args.output:
        found = {
            "model": manifest["name"],
            "weights_sha256": manifest["fingerprint"]["weights_sha256"],
            "prompts_sha256": sha256_file(args.prompts),
            "prompts": len(prompts),
            "max_tokens": args.max_tokens,
            "dtype": args.dtype,
            "count": args.count,
            "layers": steps[-1].skipped,
            "agreement": steps[-1].agreement,
            "steps": [asdict(step) for step in steps],
        }
        write_json(args.output, found)
        print(args.output)
