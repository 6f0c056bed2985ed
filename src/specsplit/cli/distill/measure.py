"""specsplit distill measure"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from specsplit.cli.distill import add_target_flag, add_terminal_flag
from specsplit.cli.flags import add_interval_flags, interval_settings
from specsplit.errors import UserError


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_target_flag(parser)
    parser.add_argument("--draft", type=Path, required=True, metavar="FOLDER", help="the draft")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="JSONL of prompts")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.csv", help="acceptance by position")
    parser.add_argument("--rounds", type=Path, required=True, metavar="FILE.csv", help="a row for each round")
    parser.add_argument("--report", type=Path, required=True, metavar="FILE.json", help="on what, for the card")
    parser.add_argument("--gamma", type=int, default=8, metavar="N", help="positions of a draft (default: 8)")
    parser.add_argument("--max-output-tokens", type=int, default=64, metavar="N", help="a text (default: 64)")
    parser.add_argument("--limit", type=int, metavar="N", help="take a slice of this many prompts (default: all)")
    parser.add_argument("--use-chat-template", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--target-dtype", default="float32", help="as in the sweep (default: float32)")
    parser.add_argument("--draft-dtype", default="bfloat16", help="as in the sweep (default: bfloat16)")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N (default: auto)")
    parser.add_argument("--engine", default="auto", help="auto | fused | transformers (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="compute threads (default: every core it may use)")
    add_interval_flags(parser)
    add_terminal_flag(parser)


def run(args: argparse.Namespace) -> None:
    for flag in ("gamma", "max_output_tokens"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: wanted a whole number >= 1")
    intervals = interval_settings(args)
    from specsplit.distill.process import prepare_process

    prepare_process(args.seed, args.threads)
    from specsplit.distill.acceptance import Round, acceptance, measure
    from specsplit.engines.loading import load_model
    from specsplit.experiment.dataset import load_prompts, select_prompts
    from specsplit.experiment.progress import Bar
    from specsplit.io import sha256_file, write_csv, write_json
    from specsplit.launch.environment import usable_cores
    from specsplit.models.sources import resolve_model
    from specsplit.models.tokenizer import TextCodec
    from specsplit.models.vocabulary import load_vocabulary
    from specsplit.settings.processes import DraftWorkerConfig, TargetWorkerConfig

    prompts = select_prompts(load_prompts(args.prompts)[0], args.limit)
    common = {"device": args.device, "engine": args.engine, "threads": args.threads}
    threads = args.threads or usable_cores()
    target_config = TargetWorkerConfig.load({"model": args.target, "dtype": args.target_dtype, **common})
    draft_config = DraftWorkerConfig.load({"model": args.draft, "dtype": args.draft_dtype, **common})
    target_folder, target_manifest = resolve_model(args.target)
    draft_folder, draft_manifest = resolve_model(args.draft)
    target, target_is = load_model(target_folder, target_manifest, target_config, threads)
    draft, draft_is = load_model(draft_folder, draft_manifest, draft_config, threads)
    vocabulary = load_vocabulary(draft_folder, target_folder, draft.vocab_size)
    codec = TextCodec.load(target_folder)
    requests = [
        (prompt.id, prompt.category, codec.encode(prompt.prompt, use_chat_template=args.use_chat_template))
        for prompt in prompts
    ]
    with Bar(len(requests), "req", args.terminal_fd) as bar:
        done = 0

        def show(request_id: str, rounds: Sequence[Round]) -> None:
            nonlocal done
            done += 1
            accepted, drafted = sum(r.accepted for r in rounds), sum(r.drafted for r in rounds)
            bar.to(done, f"{request_id}: {accepted} of {drafted} drafted tokens accepted")

        rounds = measure(
            target, draft, vocabulary, requests, gamma=args.gamma, max_tokens=args.max_output_tokens, on_request=show
        )
    table = acceptance(rounds, **intervals)
    write_csv(rounds, args.rounds)
    write_csv(table, args.output)
    write_json(
        args.report,
        {
            "prompts": len(prompts),
            "prompts_sha256": sha256_file(args.prompts),
            "gamma": args.gamma,
            "max_output_tokens": args.max_output_tokens,
            "target": {**target_is, "dtype": args.target_dtype},
            "draft": {**draft_is, "dtype": args.draft_dtype},
            "tokens_per_round": (int(rounds["accepted"].sum()) + len(rounds)) / len(rounds),
        },
    )
    print(table.to_string(index=False, float_format="{:.3f}".format))
    print(args.output)
