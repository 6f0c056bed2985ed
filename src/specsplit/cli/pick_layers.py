"""specsplit pick-layers"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.errors import UserError
from specsplit.settings.measure import LayerSettings


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="the target, prepared or local")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="prompts to search on")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="what was found, as JSON")
    add_setting_flags(parser, LayerSettings)


def run(args: argparse.Namespace) -> None:
    import torch

    from specsplit.engines.layer_search import Step, search_layers
    from specsplit.engines.transformers import CausalLM, pick_device, pick_dtype
    from specsplit.experiment.dataset import first_turns, load_prompts, select_prompts
    from specsplit.experiment.prompt_tokens import prompt_tokens
    from specsplit.io import sha256_file, write_json
    from specsplit.models.sources import resolve_model
    from specsplit.models.tokenizer import TextCodec

    settings = load_settings(LayerSettings, args)
    prompts = select_prompts(first_turns(load_prompts(args.prompts)[0]), settings.limit)
    folder, manifest = resolve_model(args.model)
    if "weights_sha256" not in manifest["fingerprint"]:
        raise UserError(f"--model {args.model} has no weights, so no layers: name a model with weights")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    dtype = pick_dtype(settings.dtype, pick_device(settings.device))
    model = CausalLM.load(folder, dtype=dtype, device=settings.device)
    codec = TextCodec.load(folder)

    def show_candidate(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total}", end="\r" if done < total else "\r\033[K", file=sys.stderr, flush=True)

    def show_step(step: Step) -> None:
        print(f"skip layer {step.layer}: agreement {step.agreement:.3f}, skipped {step.skipped}", flush=True)

    steps = search_layers(
        model,
        [prompt_tokens(prompt, codec, chat=settings.use_chat_template) for prompt in prompts],
        count=settings.skip_count,
        max_tokens=settings.max_tokens,
        on_candidate=show_candidate,
        on_step=show_step,
    )
    if args.output:
        found = {
            "model": manifest["name"],
            "weights_sha256": manifest["fingerprint"]["weights_sha256"],
            "prompts_sha256": sha256_file(args.prompts),
            "prompts": len(prompts),
            "max_tokens": settings.max_tokens,
            "dtype": dtype,
            "count": settings.skip_count,
            "layers": steps[-1].skipped,
            "agreement": steps[-1].agreement,
            "steps": [asdict(step) for step in steps],
        }
        write_json(args.output, found)
        print(args.output)
