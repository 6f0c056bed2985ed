"""specsplit distill measure"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from specsplit.cli.distill import add_target_flag
from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.cli.measuring import add_terminal_flag
from specsplit.errors import counted
from specsplit.settings.distill import AcceptanceSettings


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_target_flag(parser)
    parser.add_argument("--draft", type=Path, required=True, metavar="FOLDER", help="the draft")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="file of prompts")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.csv", help="acceptance by position")
    parser.add_argument("--rounds", type=Path, required=True, metavar="FILE.csv", help="a row for each round")
    parser.add_argument("--report", type=Path, required=True, metavar="FILE.json", help="on what, for the card")
    add_setting_flags(parser, AcceptanceSettings)
    add_terminal_flag(parser)


def run(args: argparse.Namespace) -> None:
    settings = load_settings(AcceptanceSettings, args)
    from specsplit.distill.process import prepare_process

    prepare_process(settings.seed, settings.threads)
    from specsplit.decoding.loop import Round
    from specsplit.distill.acceptance import acceptance, measure
    from specsplit.engines.loading import load_model
    from specsplit.experiment.dataset import first_turns, load_prompts, select_prompts
    from specsplit.experiment.progress import Bar
    from specsplit.experiment.prompt_tokens import prompt_tokens
    from specsplit.io import sha256_file, write_csv, write_json
    from specsplit.launch.environment import usable_cores
    from specsplit.models.sources import resolve_model
    from specsplit.models.tokenizer import TextCodec
    from specsplit.models.vocabulary import load_vocabulary
    from specsplit.settings.worker import DraftWorkerConfig, TargetWorkerConfig

    prompts = select_prompts(first_turns(load_prompts(args.prompts)[0]), settings.limit)
    common = {"device": settings.device, "engine": settings.engine, "threads": settings.threads}
    threads = settings.threads or usable_cores()
    target_config = TargetWorkerConfig.load({"model": args.target, "dtype": settings.target_dtype, **common})
    draft_config = DraftWorkerConfig.load(
        {"model": args.draft, "dtype": settings.draft_dtype, "target_tokenizer": args.target, **common}
    )
    target_folder, target_manifest = resolve_model(args.target)
    draft_folder, draft_manifest = resolve_model(args.draft)
    target, target_is = load_model(target_folder, target_manifest, target_config, threads)
    draft, draft_is = load_model(draft_folder, draft_manifest, draft_config, threads)
    vocabulary = load_vocabulary(draft_folder, target_folder, draft.vocab_size)
    codec = TextCodec.load(target_folder)
    requests = [
        (prompt.id, prompt.category, prompt_tokens(prompt, codec, chat=settings.use_chat_template))
        for prompt in prompts
    ]
    with Bar(len(requests), "req", args.terminal_fd) as bar:
        done = 0

        def show(request_id: str, rounds: Sequence[Round]) -> None:
            nonlocal done
            done += 1
            accepted, drafted = sum(r.accepted for r in rounds), sum(len(r.tree) for r in rounds)
            bar.to(done, f"{request_id}: {accepted} of {counted(drafted, 'drafted token')} accepted")

        rounds = measure(
            target,
            draft,
            vocabulary,
            requests,
            gamma=settings.gamma,
            max_tokens=settings.max_output_tokens,
            on_request=show,
        )
    table = acceptance(rounds, confidence=settings.confidence)
    write_csv(rounds, args.rounds)
    write_csv(table, args.output)
    write_json(
        args.report,
        {
            "prompts": len(prompts),
            "prompts_sha256": sha256_file(args.prompts),
            "gamma": settings.gamma,
            "max_output_tokens": settings.max_output_tokens,
            "target": target_is,
            "draft": draft_is,
            "tokens_per_round": (int(rounds["accepted"].sum()) + len(rounds)) / len(rounds),
        },
    )
    print(table.to_string(index=False, float_format="{:.3f}".format))
    print(args.output)
