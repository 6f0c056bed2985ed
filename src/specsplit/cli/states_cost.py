"""specsplit states-cost"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit import tracing
from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.cli.sweep_flags import add_figure_flag, add_prompts_flag, add_workers_dir_flag
from specsplit.errors import RunError, UserError
from specsplit.settings.measure import StatesCostSettings
from specsplit.settings.run import NO_NETWORK, OrchestratorConfig


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_prompts_flag(parser)
    parser.add_argument(
        "--output", type=Path, required=True, help="CSV table, one row a kind, round trip and bandwidth"
    )
    add_figure_flag(parser)
    add_workers_dir_flag(parser)
    parser.add_argument("--head-addr", metavar="ADDR", help="host:port of the draft worker whose model reads states")
    # Greedy texts of a fixed length in mode sync.
    without = (
        *("mode", "temperature", "jitter_ms", "top_k", "top_p", "sampling", "draft_acceptance", "draft_name"),
        *("max_output_tokens", "max_rounds", "ignore_eos", "stop", "stop_token_ids", "fan_out", "tree"),
        *("hidden_states_form", "hidden_states_project", "hidden_states_window"),
    )
    add_setting_flags(parser, StatesCostSettings, OrchestratorConfig, without=without)


def run(args: argparse.Namespace) -> None:
    import pandas as pd

    from specsplit.analysis.states_table import draw_states_cost, summarize_states_cost
    from specsplit.cli.plan import connected_configs, describe_texts, load_codec, read_prompts
    from specsplit.client.handshake import connected_pair
    from specsplit.experiment.runner import encode_prompts
    from specsplit.experiment.states_cost import DRAFT, HEAD, StatesRecord, measure_states_cost
    from specsplit.io import write_csv
    from specsplit.provenance.closure import code_sha256
    from specsplit.provenance.facts import beside_run
    from specsplit.provenance.run_file import describe_here, write_run

    settings = load_settings(StatesCostSettings, args)
    fixed = {"mode": "sync", "temperature": 0.0, **NO_NETWORK, "ignore_eos": True, "gamma": settings.gamma}
    tracing.wanted()
    config = load_settings(OrchestratorConfig, args, **fixed, max_output_tokens=settings.output_tokens)
    codec = load_codec(config)
    if not (args.workers_dir or args.head_addr):
        raise UserError("--head-addr is missing: the draft worker whose model reads hidden states")
    for_head = {"draft_name": HEAD, "draft_address": args.head_addr or config.draft_address}
    if "target" in settings.project:  # the handshake asks for the fc of this head
        for_head["hidden_states_project"] = "target"
    pairs = [
        connected_configs(args, [settings.gamma], own, codec) for own in (config, config.model_copy(update=for_head))
    ]
    (draft,), (head,) = (found for found, _, _ in pairs)
    for own, reads in ((draft, False), (head, True)):
        with connected_pair(own, codec.sha256) as (worker, _):
            if worker is not None and worker.description.HasField("states_needed") != reads:
                what = "reads no hidden states" if reads else "reads hidden states"
                key, wanted = ("head", "a head of this target") if reads else ("draft", "a draft that reads none")
                raise UserError(
                    f"{worker.description.model}, at {own.draft_address}, {what}: name {wanted} by states_cost.{key}, "
                    f"or start its worker and name that by --{key}-addr"
                )
    limit, raisable = min(limit for _, limit, _ in pairs)
    prompts = read_prompts(args.prompts, settings)
    room = limit - settings.output_tokens
    requests = encode_prompts(prompts, codec, chat=config.use_chat_template, limit=room, raisable=raisable)
    workers = [worker for _, _, found in pairs for worker in found]
    run = describe_here() | describe_texts(args.prompts, codec, config, workers)
    # Of these texts and drafts, whatever those of the sweep are.
    for name in ("max_output_tokens", "ignore_eos", "stop", "stop_token_ids", *NO_NETWORK):
        run["orchestrator"].pop(name, None)
    run["ours"] = {
        name: {
            "workers": {worker["role"]: worker for worker in found},
            "orchestrator": run["orchestrator"] | {"draft_name": f"states_cost.{name}"},
        }
        for name, (_, _, found) in zip((DRAFT, HEAD), pairs, strict=True)
    }

    def show(rows: list[StatesRecord]) -> None:
        first = rows[0]
        times = ", ".join(f"{row.total_latency_ms / row.generated_tokens:.1f}" for row in rows)
        network = f"RTT {first.rtt_ms:g} ms, {first.bandwidth_mbit:g} Mbit/s"
        print(f"{network}, {first.request_id}: {times} ms a token", flush=True)

    decides = {"workers": workers, "machine": run["machine"], "code": code_sha256("states-cost")}
    differing = 0

    def finish(rows: list[StatesRecord]) -> None:
        nonlocal differing
        differing = sum(not row.lossless for row in rows)
        table = summarize_states_cost(pd.DataFrame(rows))
        write_csv(table, args.output)
        write_run(beside_run(args.output), run, [args.output])
        print(args.output)
        if args.figure is not None:
            for path in draw_states_cost(table, args.figure):
                print(path)

    measure_states_cost(requests, draft, head, settings, args.output, decides=decides, on_rows=show, on_end=finish)
    if differing:
        raise RunError(f"{differing} texts differ from those of the target alone")
