"""specsplit openai-load"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.cli.sweep_flags import add_prompts_flag, add_workers_dir_flag
from specsplit.errors import UserError
from specsplit.settings.measure import CapacitySettings
from specsplit.settings.run import NO_NETWORK, OrchestratorConfig


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_prompts_flag(parser)
    parser.add_argument("--output", type=Path, required=True, help="CSV table, one row a gamma and number of clients")
    add_workers_dir_flag(parser)
    # Greedy texts of one length, without a simulated network, from clients that send at once.
    without = (
        *("temperature", *NO_NETWORK, "top_k", "top_p", "sampling", "draft_acceptance", "max_rounds"),
        *("ignore_eos", "stop", "stop_token_ids", "use_chat_template", "seed"),
        *("rates", "arrivals", "burstiness", "saturation_steps", "tpot_limit_ms", "ttft_limit_ms"),
    )
    add_setting_flags(parser, CapacitySettings, OrchestratorConfig, without=without)


def run(args: argparse.Namespace) -> None:
    from specsplit.cli.plan import connected_configs, describe_texts, load_codec, read_prompts
    from specsplit.experiment.openai_load import LoadRow, client_version, measure_openai_load
    from specsplit.experiment.rows import writing_rows
    from specsplit.experiment.runner import encode_prompts
    from specsplit.models.sources import tokenizer_folder
    from specsplit.provenance.facts import beside_run
    from specsplit.provenance.run_file import describe_here, write_run

    client_version()
    settings = load_settings(CapacitySettings, args)
    fixed = {"mode": settings.mode, "gamma": settings.gamma[0], "temperature": 0.0, **NO_NETWORK}
    config = load_settings(OrchestratorConfig, args, **fixed)
    codec = load_codec(config)
    assert config.tokenizer is not None
    configs, (limit, raisable), workers = connected_configs(args, settings.gamma, config, codec)
    if configs[0].gamma != 0:  # the target of another point, alone
        configs = [configs[0].model_copy(update={"gamma": 0}), *configs]
    prompts = read_prompts(args.prompts, settings)
    lengths = [len(r.token_ids) for r in encode_prompts(prompts, codec, chat=True, limit=limit, raisable=raisable)]
    room = limit - config.max_output_tokens - 1
    if room < 1:
        raise UserError(
            f"--max-output-tokens {config.max_output_tokens}: the workers hold {limit} tokens, prompt included"
        )
    length = min(round(median(lengths)), room)
    book = "\n\n".join(prompt.prompt for prompt in prompts)
    book = "\n\n".join([book] * (1 + 4 * length // len(codec.encode(book, use_chat_template=False))))
    run = describe_here() | describe_texts(args.prompts, codec, config, workers)
    for own in ("ignore_eos", "stop", "stop_token_ids", "use_chat_template"):  # which the requests say
        run["orchestrator"].pop(own, None)
    rows = measure_openai_load(
        configs,
        sorted(set(settings.clients)),
        tokenizer=tokenizer_folder(config.tokenizer),
        book=book,
        prompt_tokens=length,
        requests=settings.requests,
    )
    with writing_rows(args.output, LoadRow) as write:
        for row in rows:
            write(row)
            told = f"{row.requests} requests, {row.tokens_per_second:.1f} tokens/s"
            print(f"gamma {row.gamma}, {row.clients} clients: {told}", flush=True)
    write_run(beside_run(args.output), run, [args.output])
    print(args.output)
