"""specsplit openai-load"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.cli.measuring import NOT_GREEDY, add_prompts_flag, add_workers_dir_flag, greedy, leave
from specsplit.errors import UserError, counted
from specsplit.settings.measure import CapacitySettings
from specsplit.settings.run import OrchestratorConfig


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_prompts_flag(parser)
    parser.add_argument("--output", type=Path, required=True, help="CSV table, one row a gamma and number of clients")
    add_workers_dir_flag(parser)
    # Texts of one length, from clients that send at once.
    without = (
        *(*NOT_GREEDY, "max_rounds"),
        *("ignore_eos", "stop", "stop_token_ids", "use_chat_template", "seed"),
        *("rates", "arrivals", "burstiness", "saturation_steps", "tpot_limit_ms", "ttft_limit_ms"),
    )
    add_setting_flags(parser, CapacitySettings, OrchestratorConfig, without=without)


def run(args: argparse.Namespace) -> None:
    from specsplit.cli.plan import at_gammas, connect
    from specsplit.experiment.columns import writing_rows
    from specsplit.experiment.openai_load import LoadRow, client_version, measure_openai_load
    from specsplit.models.sources import tokenizer_folder

    client_version()
    settings = load_settings(CapacitySettings, args)
    config = greedy(args, mode=settings.mode, gamma=settings.gamma[0])
    said = ("ignore_eos", "stop", "stop_token_ids", "use_chat_template")  # by the requests
    found = connect(args, settings, at_gammas(config, settings.gamma), own=said)
    assert config.tokenizer is not None
    configs = found.configs
    if configs[0].gamma != 0:  # the target of another point, alone
        configs = [configs[0].model_copy(update={"gamma": 0}), *configs]
    room = found.limit - config.max_output_tokens - 1
    if room < 1:
        raise UserError(
            f"--max-output-tokens {config.max_output_tokens}: the workers hold {found.limit} tokens, prompt included"
        )
    length = min(round(median(len(request.token_ids) for request in found.requests)), room)
    book = "\n\n".join(prompt.prompt for prompt in found.prompts)
    book = "\n\n".join([book] * (1 + 4 * length // len(found.codec.encode(book, use_chat_template=False))))
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
            told = f"{counted(row.requests, 'request')}, {row.tokens_per_second:.1f} tokens/s"
            print(f"gamma {row.gamma}, {counted(row.clients, 'client')}: {told}", flush=True)
    leave(args.output, found.run)
